"""How long megaback takes to the loss that nanoGPT's recipe reaches in ten minutes.

    python benchmarks/time_to_loss.py SHARDS [--baseline-s 600] [--ours-s 200] [--take-back TOKENS]

A model of 14 million parameters (6 layers, width 384, context 512) on the CPUs of this machine,
learning the backward direction of SHARDS. The baseline is nanoGPT's recipe as smolGPT runs it:
random crops of 16 rows that know no documents, AdamW at 6e-4 with betas 0.9 and 0.95, 5% of warmup,
a cosine to 10%, bf16 autocast, torch.compile, no dropout. Ours is the command `megaback train` with
benchmarks/time_to_loss.yaml, for as many steps as fit into its time. With --take-back, one part of
our recipe at a time is that of the baseline, for the same number of tokens: what each part brings
then depends on no other load of the machine, and what it costs is said in CPU time.

Time is the wall time of training steps: compiling, validation and start-up are left out on both
sides. Both are measured by the loss over the same whole val set; the baseline may attend across
documents there too, if that is better for it.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from data_pipeline.frame_store import FrameStore
from data_pipeline.rows import IGNORED_TARGET
from launcher.local import rank_environment
from megaback.attention import Segments
from megaback.config import Config, load_config
from megaback.evaluation import to_device
from megaback.model import ReverseGPT
from megaback.run_data import Data, open_data

CONFIG = Path(__file__).with_name("time_to_loss.yaml")
CPU = torch.device("cpu")
ROWS = 16
_LEARNING_RATE, _WARMUP, _FLOOR = 6e-4, 0.05, 0.1
TAKEN_BACK = {
    "ours": (),
    "AdamW": ("optimizer.name=adamw",),
    "rate 6e-4": ("optimizer.learning_rate=6e-4",),
    "16 rows": ("batch.global_batch_rows=16", "batch.micro_batch_rows=16"),
    "bf16": ("training.precision=bf16",),
    "cosine to 10%": ("optimizer.schedule=cosine", "optimizer.final_learning_rate_ratio=0.1"),
    "no QK norm": ("model.qk_norm=false",),
}


def whole_rows(query_THD: Tensor, key_TKD: Tensor, value_TKD: Tensor, _: Segments) -> Tensor:
    """Causal attention over rows, whatever documents they hold: one call, which compiles."""
    rows = [
        packed.unflatten(0, (ROWS, -1)).transpose(1, 2)
        for packed in (query_THD, key_TKD, value_TKD)
    ]
    return F.scaled_dot_product_attention(*rows, is_causal=True).transpose(1, 2).flatten(0, 1)


def crops(data: Data, context_tokens: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids and targets of random rows of the whole stream of documents."""
    frames: FrameStore = data.streams[0].rows.frames
    stream = np.concatenate([frames.frame(number) for number in range(frames.num_frames)])
    ids = torch.from_numpy(stream.astype(np.int64))
    generator = torch.Generator().manual_seed(0)
    while True:
        starts = torch.randint(len(ids) - context_tokens, (ROWS,), generator=generator)
        windows = torch.stack(
            [ids[start : start + context_tokens + 1] for start in starts.tolist()]
        )
        yield windows[:, :-1].reshape(-1), windows[:, 1:].reshape(-1)


def train_baseline(config: Config, seconds: float) -> dict[str, float]:
    """nanoGPT's recipe; its schedule goes by the time that has passed."""
    context_tokens = config.batch.context_tokens
    batch = config.batch.model_copy(update={"global_batch_rows": ROWS, "micro_batch_rows": ROWS})
    data = open_data(config.model_copy(update={"batch": batch}), 0, 1)
    shape = config.model.model_copy(update={"qk_norm": False})
    model = ReverseGPT(shape, data.codec.vocab_size, whole_rows)
    model.initialize(0)
    optimizer = torch.optim.AdamW(
        [
            {"params": [one for one in model.parameters() if one.ndim >= 2], "weight_decay": 0.1},
            {"params": [one for one in model.parameters() if one.ndim < 2], "weight_decay": 0.0},
        ],
        lr=_LEARNING_RATE,
        betas=(0.9, 0.95),
        fused=True,
    )
    compiled = torch.compile(model)
    rows = crops(data, context_tokens)
    positions_T = torch.arange(context_tokens).repeat(ROWS)
    segments = Segments.from_lengths((context_tokens,) * ROWS, CPU)

    def backward() -> float:
        ids_T, targets_T = next(rows)
        with torch.autocast("cpu", torch.bfloat16):
            loss = compiled(ids_T, targets_T, positions_T, segments).mean()
        loss.backward()
        return float(loss.detach())

    for _ in range(2):
        backward()
        optimizer.zero_grad()
    steps, passed_s, cpu_s = 0, 0.0, 0.0
    while passed_s < seconds:
        started, cpu_started = time.perf_counter(), time.process_time()
        progress = passed_s / seconds
        factor = (
            progress / _WARMUP
            if progress < _WARMUP
            else _FLOOR
            + (1 - _FLOOR) * 0.5 * (1 + math.cos(math.pi * (progress - _WARMUP) / (1 - _WARMUP)))
        )
        for group in optimizer.param_groups:
            group["lr"] = _LEARNING_RATE * factor
        loss = backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        passed_s += time.perf_counter() - started
        cpu_s += time.process_time() - cpu_started
        steps += 1
        if steps % 20 == 0:
            print(f"baseline step {steps}: loss {loss:.3f}, {passed_s:.0f} s", file=sys.stderr)
    data.training.close()
    return {
        "val_loss": min(measure(compiled, data, alone) for alone in (True, False)),
        "steps": steps,
        "tokens": steps * ROWS * context_tokens,
        "seconds": passed_s,
        "cpu_s": cpu_s,
        "parameters": model.num_parameters(),
    }


@torch.no_grad()
def measure(model: torch.nn.Module, data: Data, alone: bool) -> float:
    """Nats a target of the whole val set, documents attending `alone` or across their rows."""
    from megaback.attention import sdpa_attention

    inner = getattr(model, "_orig_mod", model)
    inner.eval()
    for block in inner.model.layers:
        eager = torch.compiler.disable(sdpa_attention)
        block.self_attn.backend = eager if alone else whole_rows
    nats, targets = 0.0, 0
    for batch in data.validation(0, 1):
        ids_T, targets_T, positions_T, segments = to_device(batch, CPU)
        if not alone:
            positions_T = torch.arange(len(ids_T) // ROWS).repeat(ROWS)
        with torch.autocast("cpu", torch.bfloat16):
            nats += float(inner(ids_T, targets_T, positions_T, segments).sum())
        targets += int((targets_T != IGNORED_TARGET).sum())
    return nats / targets


def train_ours(
    shards: str, seconds: float, tokens: int, overrides: tuple[str, ...]
) -> dict[str, float]:
    """`megaback train` for so many tokens; if 0, for as many steps as fit into the time.

    What fits is judged by the pace of a short run.
    """

    def run(folder: Path, steps: int) -> list[dict[str, float]]:
        words = [f"run={folder}", f"data.shards={shards}", f"training.steps={steps}", *overrides]
        subprocess.run(
            [sys.executable, "-m", "megaback", "train", str(CONFIG), *words],
            check=True,
            env=rank_environment("cpu", 1),
            stdout=subprocess.DEVNULL,
        )
        return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]

    with TemporaryDirectory() as name:
        if tokens:
            batch = load_config(CONFIG, overrides).batch
            steps = tokens // (batch.global_batch_rows * batch.context_tokens)
        else:
            paced = [line["step_s"] for line in run(Path(name) / "pace", 12) if "step_s" in line]
            steps = int(seconds / statistics.median(paced[4:]))
        cpu_before = os.times().children_user + os.times().children_system
        lines = run(Path(name) / "run", steps)
        cpu_s = os.times().children_user + os.times().children_system - cpu_before
    return {
        "val_loss": lines[-1]["val_loss"],
        "steps": steps,
        "tokens": [line["tokens_seen"] for line in lines if "step_s" in line][-1],
        "seconds": sum(line["step_s"] for line in lines if "step_s" in line),
        "cpu_s": cpu_s,
    }


def show(title: str, found: dict[str, float]) -> None:
    click.echo(
        f"{title:<16}val loss {found['val_loss']:.4f} after {found['seconds']:6.1f} s, "
        f"{found['steps']:,} steps, {found['tokens']:,} tokens; {found['cpu_s']:.0f} CPU-s"
    )


@click.command()
@click.argument("shards")
@click.option("--baseline-s", default=600.0, show_default=True, help="0: leave it out.")
@click.option("--ours-s", default=200.0, show_default=True, help="0: leave it out.")
@click.option(
    "--take-back", default=0, help="Then, with one part of the baseline at a time, so many tokens."
)
@click.option("--only", multiple=True, help="Of what is taken back, only this.")
def main(
    shards: str, baseline_s: float, ours_s: float, take_back: int, only: tuple[str, ...]
) -> None:
    """Print val losses and times of the baseline and of ours."""
    shards = str(Path(shards).resolve())
    config = load_config(CONFIG, (f"data.shards={shards}",))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if baseline_s:
        show("baseline", train_baseline(config, baseline_s))
    if ours_s:
        show("ours", train_ours(shards, ours_s, 0, ()))
    for name, overrides in TAKEN_BACK.items():
        if take_back and (name in only or not only):
            show(name, train_ours(shards, 0, take_back, overrides))


if __name__ == "__main__":
    main()
