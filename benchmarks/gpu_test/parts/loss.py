"""Head and loss in chunks: memory and time of sizes of chunks, against whole logits."""

import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from torch import Tensor

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import LOSS_CHUNKS
from data_pipeline.loading.rows import IGNORED_TARGET
from megaback.model.output_head import OutputHead

_MAX_ERROR = 0.02
"""Error of the gradients in bf16, relative to the root mean square of those of whole logits."""


def run(bench: Bench) -> None:
    tokens = bench.sized(16_384, 256, 64)
    width = bench.sized(2048, 64, 16)
    chunks = bench.sized((128, 512, 2048), (32, 64, 128), (16,))
    for vocab_size in bench.sized((32_000, 128_256), (2_000, 8_000), (300,)):
        whole = None
        for chunk in (None, *chunks):
            name = f"vocabulary {vocab_size}, " + (
                "whole" if chunk is None else f"chunks of {chunk}"
            )
            with bench.attempt(name, LOSS_CHUNKS):
                gradient_TD = _measure(bench, name, tokens, width, vocab_size, chunk)
                if whole is None:
                    whole = gradient_TD
                else:
                    error = float((gradient_TD - whole).square().mean() / whole.square().mean())
                    bench.require(
                        f"{name}: gradient",
                        error**0.5 <= _MAX_ERROR,
                        f"that of whole logits, at most {_MAX_ERROR} off",
                        LOSS_CHUNKS,
                        error=error**0.5,
                    )


def _measure(
    bench: Bench, name: str, tokens: int, width: int, vocab_size: int, chunk: int | None
) -> Tensor:
    """Record time and memory of a forward and backward pass; the gradient of the hidden states."""
    torch.manual_seed(0)
    with bench.device:
        head = OutputHead(width, vocab_size, chunk or tokens).to(torch.bfloat16)
        hidden_TD = torch.randn(tokens, width, dtype=torch.bfloat16, requires_grad=True)
        targets_T = torch.randint(0, vocab_size, (tokens,))
        targets_T[::7] = IGNORED_TARGET

    def one_pass() -> None:
        hidden_TD.grad = head.weight.grad = None
        if chunk is None:
            losses_T = F.cross_entropy(
                head(hidden_TD).float(), targets_T, ignore_index=IGNORED_TARGET, reduction="none"
            )
        else:
            losses_T = head(hidden_TD, targets_T)
        torch.autograd.backward(losses_T.sum() / tokens)

    one_pass()
    assert hidden_TD.grad is not None
    gradient_TD = hidden_TD.grad.float()
    hidden_TD.grad = head.weight.grad = None
    peak_bytes = bench.peak_bytes(one_pass)
    seconds = bench.seconds(one_pass, bench.sized(5, 2, 1))
    bench.measured(
        name, LOSS_CHUNKS, tokens=tokens, width=width, seconds=seconds, memory_bytes=peak_bytes
    )
    return gradient_TD
