"""Head and loss in chunks of tokens, compared with whole logits: peak memory and CPU time.

    python benchmarks/loss_chunks.py [--tokens 4096] [--width 256] [--precision fp32]

Forward and backward pass of the output head and the cross-entropy, in a process of one thread for
each contender. Memory is the peak resident memory (VmHWM of Linux) less that before the first pass;
glibc returns freed blocks at once. Whole logits are PyTorch's `linear` and `cross_entropy`, which
megaback used before. The bound is the time of the three matrix products alone.
"""

import gc
import json
import os
import statistics
import subprocess
import sys
import time

import click
import torch
import torch.nn.functional as F  # noqa: N812 - PyTorch's own name for it
from smoke import Benchmark
from torch import Tensor

from launcher.ranks.local import rank_environment
from megaback.distributed.device_limits import peak_memory_bytes
from megaback.model.output_head import OutputHead

_MALLOC = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
_WHOLE, _PRODUCTS = "whole", "products"


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
    hidden_TD.grad = head.weight.grad = None


def measure(
    kind: str, tokens: int, width: int, vocab_size: int, precision: str, turns: int
) -> dict[str, float]:
    """Peak memory in bytes, and the median CPU time of a pass in seconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    chunk_tokens = int(kind) if kind.isdecimal() else tokens
    head = OutputHead(width, vocab_size, chunk_tokens).to(dtype)
    hidden_TD = torch.randn(tokens, width, dtype=dtype, requires_grad=True)
    targets_T = torch.randint(0, vocab_size, (tokens,))
    one_pass(kind, head, hidden_TD[:8].detach().requires_grad_(), targets_T[:8])  # loads libraries
    gc.collect()
    before = peak_memory_bytes(hidden_TD.device)
    times_s = []
    for _ in range(turns):
        started = time.process_time()
        one_pass(kind, head, hidden_TD, targets_T)
        times_s.append(time.process_time() - started)
    peak = peak_memory_bytes(hidden_TD.device)
    return {"bytes": peak - before, "cpu_s": statistics.median(times_s)}


@click.command(cls=Benchmark, smoke="--tokens 64 --width 8 --vocab-sizes 50 --chunks 16 --turns 1")
@click.option("--tokens", default=4096, show_default=True, help="Tokens of a micro-batch.")
@click.option("--width", default=256, show_default=True, help="Model width.")
@click.option(
    "--vocab-sizes", default="8888,32000,128256", show_default=True, help="Sizes of vocabularies."
)
@click.option("--chunks", default="128,512,2048", show_default=True, help="Tokens of a chunk.")
@click.option("--precision", default="fp32", show_default=True, help="fp32 or bf16.")
@click.option("--turns", default=3, show_default=True, help="Passes; the median is printed.")
@click.option("--measure", "measured", hidden=True)
def main(
    tokens: int,
    width: int,
    vocab_sizes: str,
    chunks: str,
    precision: str,
    turns: int,
    measured: str | None,
) -> None:
    """Print memory and CPU time of whole logits and of chunks, for each vocabulary."""
    if measured is not None:
        found = measure(measured, tokens, width, int(vocab_sizes), precision, turns)
        print(json.dumps(found))
        return
    options = ["--tokens", tokens, "--width", width, "--precision", precision, "--turns", turns]
    environment = {**rank_environment(1), **_MALLOC, "OMP_NUM_THREADS": "1"}
    click.echo(f"{tokens} tokens, width {width}, {precision}; {os.cpu_count()} cores")
    for vocab_size in map(int, vocab_sizes.split(",")):
        whole_s = 0.0
        for kind in (_WHOLE, *chunks.split(","), _PRODUCTS):
            words = [*options, "--vocab-sizes", vocab_size, "--measure", kind]
            command = [sys.executable, __file__, *map(str, words)]
            printed = subprocess.run(command, env=environment, check=True, capture_output=True)
            result = json.loads(printed.stdout)
            whole_s = whole_s or result["cpu_s"]
            click.echo(
                f"vocabulary {vocab_size:7,}  {kind:>8}  {result['bytes'] / 1e6:8,.0f} MB  "
                f"{result['cpu_s']:7.2f} CPU-s  {result['cpu_s'] / max(whole_s, 1e-9):.2f} of whole"
            )


if __name__ == "__main__":
    main()
