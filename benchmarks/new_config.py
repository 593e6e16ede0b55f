"""The config of `megaback new` beside a sweep of learning rates and batches, at equal time.

    python benchmarks/new_config.py --shards data/novels --parameters 1M --out runs/new_config_1m

The config is written for a size and a time, as anyone would. The sweep multiplies its learning rate
and its batch, and gives each batch as many steps as fit in the same time, by the duration of a step
on one thread, in CPU time. The same command resumes after an interruption.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from time import process_time
from typing import Any

import click
from controlled.runner import cpu_s_of_children
from smoke import Benchmark

from data_pipeline.common.atomic import write_text
from data_pipeline.common.number_ranges import PLANNED_TOKENS, POSITIVE, SECONDS
from data_pipeline.common.short_numbers import ShortNumber, shown_short
from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.config_file import load_config
from megaback.faults.exit_record import read_exit
from megaback.planning.budget import Budget, sized_run
from megaback.planning.data_summary import DataSummary
from megaback.planning.flops import flops_per_token
from megaback.planning.scaling_rules import muon_flops
from megaback.profiling.cpu_rate import measured_flops
from megaback.tracking.metrics import read_metrics
from tools.demo import run
from tools.new import START_S

_NAME = "new.yaml"


def sweep_rows(rows: int, factors: Sequence[float]) -> list[int]:
    """Rows per step of the sweep, ascending."""
    return sorted({max(round(rows * factor), 1) for factor in factors})


def write_config(out: Path, shards: str, parameters: float, seconds: float) -> dict[str, Any]:
    """Write the config for a size and a time; return the options that decide the figures."""
    data = DataSummary.of(shards)
    sized = sized_run(Budget(parameters=parameters), data)
    rate = measured_flops(
        sized.shape, data.vocab_size, sized.context_tokens, 4, threads=1, clock=process_time
    )
    words = ["--parameters", shown_short(parameters), "--shards", shards]
    minutes = (seconds + START_S) / 60
    words += ["--minutes", f"{minutes:.6g}", "--device-flops", f"{rate:.3g}"]
    run("new", *words, "--device-name", "cpu", "--out", str(out / _NAME))
    return {"shards": shards, "parameters": parameters, "seconds": seconds}


def steps_within(config: Config, vocab_size: int, rows: int, seconds: float) -> int:
    """Number of steps of a batch within a time, by steps that are measured."""
    context = config.batch.context_tokens
    rate = measured_flops(config.model, vocab_size, context, rows, threads=1, clock=process_time)
    per_token = flops_per_token(config.model, vocab_size, (context + 1) / 2)
    return max(round(seconds * rate / (rows * context * per_token + muon_flops(config.model))), 1)


def train(path: Path, config: Path, rate: float, rows: int, steps: int) -> dict[str, Any]:
    """Train one setting, unless it has been trained; its val loss and CPU time."""
    result = path.with_name(f"{path.name}.json")
    if result.exists():
        return dict(json.loads(result.read_text(encoding="utf-8")))
    before = cpu_s_of_children()
    if (read_exit(path) or {}).get("code") != 0:
        run(
            *("train", str(config), f"run={path}", f"optimizer.learning_rate={rate:.3g}"),
            *(f"batch.global_batch_rows={rows}", f"batch.micro_batch_rows={rows}"),
            *(f"training.steps={steps}", f"optimizer.warmup_steps={max(steps // 20, 1)}"),
            *("validation.every_steps=null", "checkpoint.every_steps=null"),
            *("hardware.preflight=off", "logging.tensorboard=off"),
            shows_output=False,
        )
    losses = [line["val_loss"] for line in read_metrics(path) if "val_loss" in line]
    fields = {"val_loss": losses[-1], "cpu_s": round(cpu_s_of_children() - before, 1)}
    write_text(result, json.dumps(fields) + "\n")
    return fields


def table(found: dict[tuple[float, int, int], dict[str, Any]], context: int) -> Iterator[str]:
    """The figures of each setting, as Markdown."""
    yield "| learning rate | rows per step | steps | tokens | val loss, nats/token | CPU-s |"
    yield "|---|---|---|---|---|---|"
    for (rate, rows, steps), one in found.items():
        yield (
            f"| {rate:.3g} | {rows} | {steps:,} | {steps * rows * context:,} "
            f"| {one['val_loss']:.4f} | {one['cpu_s']:.0f} |"
        )


def _claim(out: Path, shards: str, parameters: float, seconds: float) -> None:
    """Write the config into a new or empty folder. Raises ConfigError for other options' folder."""
    path = out / "settings.json"
    asked = {"shards": shards, "parameters": parameters, "seconds": seconds}
    if path.exists():
        if json.loads(path.read_text(encoding="utf-8")) != asked:
            raise ConfigError(f"{out} has results of other options; give another --out")
        return
    if out.exists() and any(one.name != _NAME for one in out.iterdir()):
        raise ConfigError(f"{out} has files of something else; give another --out")
    out.mkdir(parents=True, exist_ok=True)
    (out / _NAME).unlink(missing_ok=True)
    write_text(path, json.dumps(write_config(out, shards, parameters, seconds)) + "\n")


@click.command(
    cls=Benchmark,
    smoke="--shards {shards} --parameters 60k --cpu-s 2 --rate-factor 1 --batch-factor 1"
    " --out {out}",
)
@click.option("--shards", required=True, type=click.Path(), help="Data set with a val set.")
@click.option(
    "--parameters",
    type=ShortNumber(PLANNED_TOKENS),
    default="1M",
    show_default=True,
    help="Size of the model.",
)
@click.option(
    "--cpu-s",
    type=SECONDS.option,
    default=60.0,
    show_default=True,
    help="Duration of each run's steps, in CPU seconds of one thread.",
)
@click.option(
    "--rate-factor",
    "rate_factors",
    type=POSITIVE.option,
    multiple=True,
    default=(0.5, 1.0, 2.0),
    show_default=True,
    help="Multiple of the learning rate. May be repeated.",
)
@click.option(
    "--batch-factor",
    "batch_factors",
    type=POSITIVE.option,
    multiple=True,
    default=(0.5, 1.0, 2.0, 4.0),
    show_default=True,
    help="Multiple of the batch. May be repeated.",
)
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
def main(
    shards: str,
    parameters: float,
    cpu_s: float,
    rate_factors: tuple[float, ...],
    batch_factors: tuple[float, ...],
    out: Path,
) -> None:
    """Compare the config of `megaback new` with a sweep at equal time."""
    _claim(out, shards, parameters, cpu_s)
    config = load_config(out / _NAME)
    vocab_size = DataSummary.of(shards).vocab_size
    path = out / "steps.json"
    steps: dict[str, int] = json.loads(path.read_text()) if path.exists() else {}
    chosen_rate, chosen_rows = config.optimizer.learning_rate, config.batch.global_batch_rows
    found = {}
    for rows in sweep_rows(chosen_rows, (1.0, *batch_factors)):
        if str(rows) not in steps:
            steps[str(rows)] = steps_within(config, vocab_size, rows, cpu_s)
            write_text(path, json.dumps(steps) + "\n")
        for factor in sorted({1.0, *rate_factors}):
            rate = chosen_rate * factor
            number = steps[str(rows)]
            name = out / f"runs/rate{factor:g}-rows{rows}"
            found[rate, rows, number] = train(name, out / _NAME, rate, rows, number)
    for line in table(found, config.batch.context_tokens):
        click.echo(line)
    best = min(one["val_loss"] for one in found.values())
    key = chosen_rate, chosen_rows, steps[str(chosen_rows)]
    ours = found[key]["val_loss"]
    click.echo(
        f"\nmegaback new: {ours:.4f} nats/token at learning rate {chosen_rate:.3g} and "
        f"{chosen_rows} rows; best of {len(found)}: {best:.4f}; {ours / best - 1:.1%} above it"
    )


if __name__ == "__main__":
    main()
