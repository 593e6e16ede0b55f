"""Time to the loss that nanoGPT's recipe reaches in ten minutes.

    python benchmarks/time_to_loss.py SHARDS [--baseline-s 600] [--ours-s 200] [--take-back TOKENS]

A model of 14 million parameters (6 layers, width 384, context 512) on the CPUs of this machine,
learning the backward direction of SHARDS. The baseline is nanoGPT's recipe as smolGPT runs it:
random crops of 16 rows without document masks, AdamW at 6e-4 with betas 0.9 and 0.95, 5% of warmup,
a cosine to 10%, torch.compile, no dropout. Ours is the command `megaback train` with
benchmarks/time_to_loss.yaml, for as many steps as fit into its time. Each side runs in bf16
(autocast) or fp32, whichever has the faster step on this machine; that is measured first, and
printed. With --take-back, one part of our recipe at a time is replaced by the baseline's, for the
same number of tokens: its effect on the loss does not depend on the machine's load, and its cost is
reported in CPU time.

Time is the wall time of training steps: compilation, validation and start-up are excluded on both
sides. Both are evaluated by the loss over the same whole val set; the baseline may attend across
documents there, if that is better for it.
"""

import json
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from smoke import Benchmark
from torch import Tensor

from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.rows import IGNORED_TARGET
from launcher.ranks.local import rank_environment
from megaback.config import Config
from megaback.config_file import load_config
from megaback.data import Data, open_data
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.training.validation import to_device

CONFIG = Path(__file__).with_name("time_to_loss.yaml")
CPU = torch.device("cpu")
ROWS = 16
PRECISIONS = ("fp32", "bf16")
_PACE_STEPS = 4
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


def whole_rows(query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, _: Segments) -> Tensor:
    """Causal attention over rows without document masks: one call, which compiles."""
    rows = [
        packed.unflatten(0, (ROWS, -1)).transpose(1, 2)
        for packed in (query_THE, key_TKE, value_TKE)
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


@dataclass(frozen=True, kw_only=True)
class Result:
    """Result of one side."""

    precision: str
    val_loss: float
    steps: int
    tokens: int
    seconds: float
    cpu_s: float


def choose_precision(side: str, precision: str, fastest_s: Callable[[str], float]) -> str:
    """`precision`, or for `auto` the one with the fastest step, which is printed."""
    if precision != "auto":
        return precision
    taken = {one: fastest_s(one) for one in PRECISIONS}
    fastest = min(taken, key=taken.__getitem__)
    listed = ", ".join(f"{one} {step_s:.3f} s" for one, step_s in taken.items())
    click.echo(f"{side}: {fastest}, as the fastest steps take {listed}")
    return fastest


def train_baseline(config: Config, seconds: float, precision: str) -> Result:
    """nanoGPT's recipe; its schedule is a function of elapsed time."""
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

    def backward(precision: str) -> float:
        ids_T, targets_T = next(rows)
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = compiled(ids_T, targets_T, positions_T, segments).mean()
        loss.backward()
        return float(loss.detach())

    def fastest_s(precision: str) -> float:
        taken = []
        for _ in range(_PACE_STEPS):
            started = time.perf_counter()
            backward(precision)
            taken.append(time.perf_counter() - started)
            optimizer.zero_grad()
        return min(taken[1:])  # the first one compiles

    precision = choose_precision("baseline", precision, fastest_s)
    fastest_s(precision)  # compile before timing, if not done yet
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
        loss = backward(precision)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        passed_s += time.perf_counter() - started
        cpu_s += time.process_time() - cpu_started
        steps += 1
        if steps % 20 == 0:
            print(f"baseline step {steps}: loss {loss:.3f}, {passed_s:.0f} s", file=sys.stderr)
    data.training.close()
    val_loss = min(measure(compiled, data, precision, alone) for alone in (True, False))
    return Result(
        precision=precision,
        val_loss=val_loss,
        steps=steps,
        tokens=steps * ROWS * context_tokens,
        seconds=passed_s,
        cpu_s=cpu_s,
    )


@torch.no_grad()
def measure(model: torch.nn.Module, data: Data, precision: str, alone: bool) -> float:
    """Loss over the val set in nats per target, without attention across documents if `alone`."""
    from megaback.model.attention import sdpa_attention

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
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            nats += float(inner(ids_T, targets_T, positions_T, segments).sum())
        targets += int((targets_T != IGNORED_TARGET).sum())
    return nats / targets


def run_command(config: Path, *overrides: str) -> tuple[list[dict[str, float]], float]:
    """`megaback train` in a new folder; returns its metrics and its CPU time."""
    with TemporaryDirectory() as folder:
        words = [str(config), f"run={folder}/run", *overrides]
        before = os.times()
        subprocess.run(
            [sys.executable, "-m", "megaback", "train", *words],
            check=True,
            env=rank_environment(1),
            stdout=subprocess.DEVNULL,
        )
        after = os.times()
        text = (Path(folder) / "run" / "metrics.jsonl").read_text()
    cpu_s = after.children_user + after.children_system
    cpu_s -= before.children_user + before.children_system
    return [json.loads(line) for line in text.splitlines()], cpu_s


def train_ours(config: Path, shards: str, num_steps: int, overrides: tuple[str, ...]) -> Result:
    """`megaback train` for some steps."""
    shards_and_steps = (f"data.shards={shards}", f"training.steps={num_steps}")
    lines, cpu_s = run_command(config, *shards_and_steps, *overrides)
    steps = [line for line in lines if "step_s" in line]
    return Result(
        precision=load_config(config, overrides).training.precision,
        val_loss=lines[-1]["val_loss"],
        steps=num_steps,
        tokens=int(steps[-1]["tokens_seen"]),
        seconds=sum(line["step_s"] for line in steps),
        cpu_s=cpu_s,
    )


def train_ours_for(config: Path, shards: str, seconds: float, precision: str) -> Result:
    """Our recipe for as many steps as fit into the time, estimated from short runs."""
    pace: dict[str, list[float]] = {}

    def fastest_s(precision: str) -> float:
        words = (f"data.shards={shards}", f"training.steps={2 * _PACE_STEPS}")
        lines, _ = run_command(config, *words, f"training.precision={precision}")
        pace[precision] = [line["step_s"] for line in lines if "step_s" in line][_PACE_STEPS:]
        return min(pace[precision])

    precision = choose_precision("ours", precision, fastest_s)
    if precision not in pace:
        fastest_s(precision)
    step_s = statistics.median(pace[precision])
    num_steps = max(int(seconds / step_s), 1)
    return train_ours(config, shards, num_steps, (f"training.precision={precision}",))


def show(title: str, found: Result) -> None:
    click.echo(
        f"{title:<16}val loss {found.val_loss:.4f} after {found.seconds:6.1f} s, "
        f"{found.steps:,} steps, {found.tokens:,} tokens in {found.precision}; "
        f"{found.cpu_s:.0f} CPU-s"
    )


@click.command(
    cls=Benchmark,
    smoke="{shards} --config {config} --baseline-s 0.2 --ours-s 0.2 --take-back 4096 --only AdamW",
)
@click.argument("shards")
@click.option(
    "--baseline-s", default=600.0, show_default=True, help="Time in seconds; 0 skips this side."
)
@click.option(
    "--ours-s", default=200.0, show_default=True, help="Time in seconds; 0 skips this side."
)
@click.option(
    "--take-back",
    default=0,
    help="Tokens to train with one part of the baseline at a time; 0: none.",
)
@click.option("--only", multiple=True, help="Part to take back; default: all.")
@click.option(
    "--config", "path", type=click.Path(path_type=Path), default=CONFIG, help="Config of our side."
)
@click.option(
    "--precision",
    type=click.Choice(["auto", *PRECISIONS]),
    default="auto",
    show_default=True,
    help="Precision of both sides.",
)
def main(
    shards: str,
    baseline_s: float,
    ours_s: float,
    take_back: int,
    only: tuple[str, ...],
    path: Path,
    precision: str,
) -> None:
    """Print val losses and times of the baseline and of ours."""
    shards = str(Path(shards).resolve())
    config = load_config(path, (f"data.shards={shards}",))
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if baseline_s:
        show("baseline", train_baseline(config, baseline_s, precision))
    if ours_s:
        show("ours", train_ours_for(path, shards, ours_s, precision))
    for name, overrides in TAKEN_BACK.items():
        if take_back and (name in only or not only):
            batch = load_config(path, overrides).batch
            num_steps = take_back // (batch.global_batch_rows * batch.context_tokens)
            show(name, train_ours(path, shards, num_steps, overrides))


if __name__ == "__main__":
    main()
