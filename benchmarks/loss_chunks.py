"""Head and loss in chunks of tokens, compared with whole logits: peak memory and CPU time.

    python benchmarks/loss_chunks.py [--tokens 4096] [--width 256] [--precision fp32]

Forward and backward pass of the output head and the cross-entropy, in a process of one thread for
each contender. Memory is the peak resident memory (VmHWM of Linux) less that before the first pass;
glibc returns freed blocks at once. Whole logits are PyTorch's `linear` and `cross_entropy`, which
megaback used before. The bound is the time of the three matrix products alone.

With --num-layers, a pass is a training step of a whole model in rows of 512 tokens: forward and
backward pass and an update by PyTorch's AdamW, whose state is part of the memory.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import product

import click
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from smoke import Benchmark
from torch import Tensor

from launcher.ranks.local import rank_environment
from megaback.config import ModelSection
from megaback.distributed.device_limits import peak_memory_bytes
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.model.output_head import OutputHead

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_WHOLE, _PRODUCTS = "whole", "products"
_ROW_TOKENS = 512
_HEAD_DIM = 64


def one_pass(kind: str, head: OutputHead, hidden_TD: Tensor, targets_T: Tensor) -> None:
    """Forward and backward pass of a contender."""
    if kind == _PRODUCTS:
        weight_VD = head.weight.detach()
        for hidden_CD in hidden_TD.detach().split(256):  # logits of a chunk, which stay in memory
            logits_CV = hidden_CD @ weight_VD.t()
            _ = logits_CV @ weight_VD
            _ = logits_CV.t() @ hidden_CD
        return
    if kind == _WHOLE:
        losses_T = F.cross_entropy(head(hidden_TD).float(), targets_T, reduction="none")
    else:
        losses_T = head(hidden_TD, targets_T)
    (losses_T.sum() / len(targets_T)).backward()


def training_step(
    kind: str, num_layers: int, width: int, vocab_size: int, targets_T: Tensor, dtype: torch.dtype
) -> Callable[[int], None]:
    """A step of a whole model on the first tokens."""
    tokens = len(targets_T)
    chunk_tokens = int(kind) if kind.isdecimal() else tokens
    num_heads = max(1, width // _HEAD_DIM)
    shape = ModelSection(num_layers=num_layers, width=width, num_heads=num_heads).resolved()
    model = ReverseGPT(shape, vocab_size, loss_chunk_tokens=chunk_tokens)
    model.initialize(0)
    model.to(dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    positions_T = torch.arange(tokens) % _ROW_TOKENS

    def step(count: int) -> None:
        lengths = tuple(len(row) for row in positions_T[:count].split(_ROW_TOKENS))
        segments = Segments.from_lengths(lengths, positions_T.device)
        hidden_TD = model.hidden(targets_T[:count].roll(1), positions_T[:count], segments)
        one_pass(kind, model.lm_head, hidden_TD, targets_T[:count])
        optimizer.step()
        optimizer.zero_grad()

    return step


def head_pass(
    kind: str, width: int, vocab_size: int, targets_T: Tensor, dtype: torch.dtype
) -> Callable[[int], None]:
    """A pass of the head alone on the first tokens."""
    tokens = len(targets_T)
    head = OutputHead(width, vocab_size, int(kind) if kind.isdecimal() else tokens).to(dtype)
    hidden_TD = torch.randn(tokens, width, dtype=dtype)

    def head_only(count: int) -> None:
        one_pass(kind, head, hidden_TD[:count].requires_grad_(), targets_T[:count])
        head.weight.grad = None

    return head_only


def measure(
    kind: str,
    tokens: int,
    width: int,
    vocab_size: int,
    precision: str,
    turns: int,
    num_layers: int,
) -> dict[str, float]:
    """Peak memory in bytes, and the median CPU time of a pass in seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    targets_T = torch.randint(0, vocab_size, (tokens,))
    run = (
        training_step(kind, num_layers, width, vocab_size, targets_T, dtype)
        if num_layers
        else head_pass(kind, width, vocab_size, targets_T, dtype)
    )
    run(min(8, tokens))  # loads libraries
    gc.collect()
    before = peak_memory_bytes(targets_T.device)
    times_s = []
    for _ in range(turns):
        started = time.process_time()
        run(tokens)
        times_s.append(time.process_time() - started)
    peak = peak_memory_bytes(targets_T.device)
    return {"bytes": peak - before, "cpu_s": statistics.median(times_s)}


@click.command(
    cls=Benchmark,
    smoke="--tokens 64 --width 8 --vocab-sizes 50 --chunks 16 --turns 1 --num-layers 0,1",
)
@click.option("--tokens", default=4096, show_default=True, help="Tokens of a micro-batch.")
@click.option("--width", default=256, show_default=True, help="Model width.")
@click.option(
    "--vocab-sizes", default="8888,32000,128256", show_default=True, help="Sizes of vocabularies."
)
@click.option("--chunks", default="128,512,2048", show_default=True, help="Tokens of a chunk.")
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16.")
@click.option("--turns", default=3, show_default=True, help="Passes; the median is printed.")
@click.option(
    "--num-layers",
    default="0",
    show_default=True,
    help="Layers of models whose training step is measured; 0: the head alone.",
)
@click.option("--measure", "measured", hidden=True)
def main(
    tokens: int,
    width: int,
    vocab_sizes: str,
    chunks: str,
    precision: str,
    turns: int,
    num_layers: str,
    measured: str | None,
) -> None:
    """Print memory and CPU time of whole logits and of chunks, for each vocabulary."""
    if measured is not None:
        size = (width, int(vocab_sizes), precision, turns, int(num_layers))
        print(json.dumps(measure(measured, tokens, *size)))
        return
    options = ["--tokens", tokens, "--width", width, "--precision", precision, "--turns", turns]
    environment = {**rank_environment(1), **_MALLOC, "OMP_NUM_THREADS": "1"}
    click.echo(f"{tokens} tokens, width {width}, {precision}; {os.cpu_count()} cores")
    for layers, vocab_size in product(num_layers.split(","), map(int, vocab_sizes.split(","))):
        is_head = layers == "0"
        whole_s = 0.0
        for kind in (_WHOLE, *chunks.split(","), *([_PRODUCTS] if is_head else [])):
            words = [*options, "--num-layers", layers, "--vocab-sizes", vocab_size]
            command = [sys.executable, __file__, *map(str, words), "--measure", kind]
            printed = subprocess.run(command, env=environment, check=True, capture_output=True)
            result = json.loads(printed.stdout)
            whole_s = whole_s or result["cpu_s"]
            click.echo(
                f"{'head' if is_head else f'{layers} layers'}  vocabulary {vocab_size:7,}  "
                f"{kind:>8}  {result['bytes'] / 1e6:8,.0f} MB  {result['cpu_s']:7.2f} CPU-s  "
                f"{result['cpu_s'] / max(whole_s, 1e-9):.2f} of whole"
            )


if __name__ == "__main__":
    main()
