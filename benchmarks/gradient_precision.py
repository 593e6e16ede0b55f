"""Loss over training with gradients accumulated in bf16 and in fp32.

    python benchmarks/gradient_precision.py [--steps 200] [--seeds 0,1] [--optimizers adamw,muon]

A small GPT learns the novels that megaback ships, in bf16 at ZeRO stage 1 on one process, with 64
micro-batches per step. For each seed, both runs have the same initial weights and the same batches:
only `zero.gradient_precision` differs. Prints the loss of both over the training, and the
difference at the end, with its standard error over the seeds. `--kinds control` adds a run in fp32
whose learning rate is larger by a millionth: how far two runs drift apart by rounding alone.
`--curves` writes all losses, and `--read` reads them back from several such files, for runs in
parallel; `--figure` draws the differences.
"""

import json
import math
import os
import statistics
import subprocess
import sys
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
from smoke import Benchmark
from torch import Tensor

from data_pipeline.common.figures import new_figure, write_picture
from megaback.config import Config
from megaback.distributed.world import World, end_rank, start_world
from megaback.faults.stop_request import StopRequest
from megaback.faults.watchdog import Watchdog
from megaback.tracking.metrics import read_metrics
from megaback.train import train_run

Found = dict[tuple[str, int, str], dict[str, Any]]
"""Losses of runs by optimizer, seed and precision of gradients."""
PRECISIONS = ("bf16", "fp32")
CONTROL = "control"
_NUDGE = 1e-6
"""Relative increase of the control's learning rate."""
COLORS = {"adamw": "#0b6e99", "muon": "#b3541e"}
_TAIL = 0.1
"""Part of the steps whose mean is reported as the loss at the end."""
_WINDOW = 0.05
"""Part of the steps over which curves are averaged."""


def config_fields(
    shards: Path, run: Path, steps: int, seed: int, optimizer: str, micro_batches: int
) -> dict[str, Any]:
    """About 0.2 million parameters, and rows of 32 tokens, one per micro-batch."""
    rates = {"adamw": {}, "muon": {"matrix_learning_rate": 1e-2}}
    return {
        "run": str(run),
        "data": {"shards": str(shards)},
        "model": {"num_layers": 2, "width": 64, "num_heads": 2, "tie_embeddings": True},
        "batch": {
            "context_tokens": 32,
            "global_batch_rows": micro_batches,
            "micro_batch_rows": 1,
        },
        "optimizer": {
            "name": optimizer,
            "learning_rate": 3e-3,
            "warmup_steps": 10,
            **rates[optimizer],
        },
        "training": {"steps": steps, "precision": "bf16", "seed": seed},
        "hardware": {"device": "cpu", "processes": 1, "preflight": "off"},
        "checkpoint": {"every_steps": None},
        "logging": {"tensorboard": "off"},
    }


def build_shards(folder: Path) -> Path:
    """The novels with a vocabulary of 1,024 tokens."""
    tokenizer, shards = folder / "tokenizer", folder / "shards"
    model = tokenizer / "tokenizer.model"
    for line in (
        f"tokenizer train --source novels --vocab-size 1024 --out {tokenizer}",
        f"shards build --source novels --tokenizer {model} --out {shards} --frame-tokens 4096",
    ):
        command = [sys.executable, "-m", "megaback", *line.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return shards


def use_fast_products() -> None:
    """Multiply matrices in bf16 as GPUs do, by adding in fp32 and rounding the result.

    CPUs without instructions for bf16 take six times as long for it by PyTorch's own kernel.
    """
    library = torch.library.Library("aten", "IMPL")

    def product(left: Tensor, right: Tensor) -> Tensor:
        result = torch.empty(left.shape[0], right.shape[1])
        torch.ops.aten.mm.out(left.float(), right.float(), out=result)
        return result.to(left.dtype)

    library.impl("mm", product, "CPU")
    use_fast_products.library = library  # type: ignore[attr-defined] # as long as the process


def train(world: World, fields: dict[str, Any], precision: str) -> dict[str, Any]:
    """Train once; returns the losses of the steps, and the last val loss."""
    if precision == CONTROL:
        optimizer = fields["optimizer"]
        rate = optimizer["learning_rate"] * (1 + _NUDGE)
        fields, precision = fields | {"optimizer": optimizer | {"learning_rate": rate}}, "fp32"
    config = Config.model_validate(fields | {"zero": {"stage": 1, "gradient_precision": precision}})
    train_run(config, world, StopRequest(None), Watchdog(config.run, config.hardware, world))
    lines = read_metrics(config.run)
    return {
        "loss": [line["loss"] for line in lines if "loss" in line],
        "val_loss": [line["val_loss"] for line in lines if "val_loss" in line][-1],
    }


def train_all(
    ways: list[tuple[int, str]],
    kinds: tuple[str, ...],
    shards: Path | None,
    steps: int,
    micro_batches: int,
) -> Found:
    """Train a pair of runs for each seed and optimizer."""
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    os.environ["DS_ACCELERATOR"] = "cpu"
    torch.set_num_threads(1)
    use_fast_products()
    world = start_world("cpu", 60)
    found: Found = {}
    with TemporaryDirectory() as name:
        folder = Path(name)
        built = (shards or build_shards(folder)).absolute()
        for (seed, optimizer), precision in product(ways, kinds):
            run = folder / f"{optimizer}-{seed}-{precision}"
            fields = config_fields(built, run, steps, seed, optimizer, micro_batches)
            found[optimizer, seed, precision] = last = train(world, fields, precision)
            click.echo(
                f"{optimizer}, seed {seed}, {precision}: loss {end_of(last['loss']):.4f}, "
                f"val loss {last['val_loss']:.4f}"
            )
    return found


def end_of(losses: list[float]) -> float:
    """Mean loss of the last steps."""
    return statistics.fmean(losses[-max(round(_TAIL * len(losses)), 1) :])


def smoothed(values: list[float]) -> list[float]:
    """Means of the values before each, over a window."""
    width = max(round(_WINDOW * len(values)), 1)
    return [statistics.fmean(values[end - width : end]) for end in range(width, len(values) + 1)]


def report(found: Found) -> None:
    """Print the losses, and the difference of the paired runs."""
    for optimizer in sorted({name for name, _, _ in found}):
        for low, (what, value) in product(
            (PRECISIONS[0], CONTROL),
            (
                ("loss of the last tenth", lambda run: end_of(run["loss"])),
                ("val loss", lambda run: run["val_loss"]),
            ),
        ):
            compared = (low, PRECISIONS[1])
            seeds = sorted({key[1] for key in found if key[::2] == (optimizer, low)})
            if not all((optimizer, seed, kind) in found for seed in seeds for kind in compared):
                continue
            if not seeds:
                continue
            pairs = [[value(found[optimizer, seed, kind]) for kind in compared] for seed in seeds]
            worse = [low - high for low, high in pairs]
            error = statistics.stdev(worse) / math.sqrt(len(worse)) if len(worse) > 1 else 0.0
            means = [statistics.fmean(column) for column in zip(*pairs, strict=True)]
            click.echo(
                f"{optimizer}: {what}: {low} {means[0]:.4f}, fp32 {means[1]:.4f}; "
                f"{low} worse by {statistics.fmean(worse):+.5f} +- {error:.5f} nats "
                f"({', '.join(f'{one:+.5f}' for one in worse)})"
            )


def draw(found: Found, path: Path) -> None:
    """Draw the difference of the losses over the steps, one line per pair of runs."""
    figure = new_figure(7, 3.5)
    axes = figure.add_subplot()
    named = set()
    for optimizer, seed, precision in found:
        if precision == PRECISIONS[1]:
            continue
        low, high = (found[optimizer, seed, one]["loss"] for one in (precision, PRECISIONS[1]))
        worse = smoothed([one - other for one, other in zip(low, high, strict=True)])
        steps = range(len(low) - len(worse) + 1, len(low) + 1)
        label = {"adamw": "AdamW", "muon": "Muon"}[optimizer]
        label += ", control" if precision == CONTROL else ""
        style = ":" if precision == CONTROL else "-"
        shown = None if label in named else label
        named.add(label)
        axes.plot(steps, worse, style, color=COLORS[optimizer], linewidth=1, label=shown)
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set_xlabel("step")
    axes.set_ylabel("loss - that with fp32 gradients, nats")
    axes.legend(frameon=False)
    write_picture(figure, path, overwrite=True)


@click.command(
    cls=Benchmark,
    smoke="--steps 2 --seeds 0 --micro-batches 4 --optimizers adamw --shards {shards}",
)
@click.option("--steps", default=200, show_default=True, help="Steps per run.")
@click.option("--seeds", default="0,1", show_default=True, help="Seeds, one pair of runs each.")
@click.option("--micro-batches", default=64, show_default=True, help="Micro-batches per step.")
@click.option("--optimizers", default="adamw,muon", show_default=True, help="Optimizers.")
@click.option(
    "--kinds", default="bf16,fp32", show_default=True, help="Runs per seed; control is one more."
)
@click.option("--shards", type=click.Path(path_type=Path), help="Shards with a val set.")
@click.option(
    "--read",
    "earlier",
    type=click.Path(path_type=Path),
    multiple=True,
    help="File of --curves to read, instead of training; may be repeated.",
)
@click.option("--curves", type=click.Path(path_type=Path), help="File for all losses, as JSON.")
@click.option("--figure", type=click.Path(path_type=Path), help="PNG of the differences.")
def main(
    steps: int,
    seeds: str,
    micro_batches: int,
    optimizers: str,
    kinds: str,
    shards: Path | None,
    earlier: tuple[Path, ...],
    curves: Path | None,
    figure: Path | None,
) -> None:
    """Train pairs of runs, and print how their losses differ."""
    found: Found = {}
    for path in earlier:
        lines = json.loads(path.read_text(encoding="utf-8"))
        found |= {(optimizer, seed, precision): one for optimizer, seed, precision, one in lines}
    if not earlier:
        ways = product([int(seed) for seed in seeds.split(",")], optimizers.split(","))
        found = train_all(list(ways), tuple(kinds.split(",")), shards, steps, micro_batches)
    report(found)
    if curves is not None:
        lines = [[*key, one] for key, one in found.items()]
        curves.write_text(json.dumps(lines), encoding="utf-8")
    if figure is not None:
        draw(found, figure)
    if not earlier:
        end_rank()


if __name__ == "__main__":
    main()
