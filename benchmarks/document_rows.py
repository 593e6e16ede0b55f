"""Rows of whole documents or of a stream: val losses of models that were trained on either.

    python benchmarks/document_rows.py --shards data/prose --out runs/document_rows

One model per seed, direction and way of cutting, in turns: of a stream, of whole documents in as
many steps, so on as many positions, and of whole documents in as many steps as take the CPU time of
the stream's. Measured are the run's val loss, over all tokens of the val set as a stream, and the
loss over the beginning of every document of the val set in reading order, as much as a row holds.
Differences are paired by seed. The same command resumes.

The CPU time of a step is that of its rows and gradients, measured before the runs on steps of both
ways in turns.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from time import process_time
from typing import Any

import click
from controlled.runner import DIRECTIONS, Folder, cell, cpu_line
from smoke import Benchmark

from data_pipeline.common.atomic import write_text
from data_pipeline.common.number_ranges import COUNT
from data_pipeline.errors import ConfigError
from data_pipeline.loading.document_index import open_document_index
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import Direction
from megaback.config_file import load_config
from megaback.run_folder import complete_checkpoints
from megaback.tracking.metrics import read_metrics

_WARMUP_STEPS = 5
_LOSSES = ("stream", "beginnings")


@dataclass(frozen=True)
class Way:
    """A way of cutting rows, and the length of its runs."""

    name: str
    rows: str
    is_of_equal_time: bool = False


STREAM = Way("stream", "stream")
DOCUMENTS = Way("documents", "documents")
DOCUMENTS_IN_TIME = Way("documents_in_time", "documents", is_of_equal_time=True)


def loss_of_beginnings(path: Path, shards: Path, direction: Direction) -> float:
    """Mean loss of a run's model on the first `context_tokens` + 1 tokens of each val document."""
    import torch

    from megaback.model.gpt import ReverseGPT
    from megaback.scoring.directions import Markers, Window, documents_of, measure
    from megaback.weights.source import open_checkpoint

    source = open_checkpoint(complete_checkpoints(path)[-1])
    description = source.description
    context_tokens = description.context_tokens
    model = ReverseGPT(description.shape, description.vocab_size)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(source.read(name))
    data_set = DataSet.open(shards)
    codec = data_set.codec()
    windows = []
    for number, ids in enumerate(documents_of(data_set, "val")):
        start = 0
        if direction is Direction.BACKWARD:
            start = max(len(ids) - context_tokens - 1, 0)
        windows.append(
            Window(
                document=number,
                ids=ids[start : start + context_tokens + 1],
                start=start,
                document_tokens=len(ids),
                weight=1.0,
            )
        )
    markers = Markers(codec.begin_id, codec.end_id)
    losses = measure(
        model.eval(),
        direction,
        windows,
        context_tokens,
        markers,
        codec.piece_num_bytes(),
        lambda _: None,
    )
    sums, targets = losses.nats_of_context_NB.sum(), losses.targets_of_context_NB.sum()
    return float(sums / targets)


def step_cpu_s(
    folder: Folder, shards: Path, direction: str, num_steps: int
) -> dict[str, list[float]]:
    """CPU seconds of the rows and gradients of the first steps, by way of cutting; kept."""
    path = folder.out / f"step_cpu-{direction}.json"
    if not path.exists():
        import torch

        from megaback.data import open_data
        from megaback.model.gpt import ReverseGPT
        from megaback.training.validation import to_device

        overrides = (f"data.shards={shards}", f"data.direction={direction}", "data.threads=0")
        configs = {
            way.rows: load_config(folder.config, (*overrides, f"data.rows={way.rows}"))
            for way in (STREAM, DOCUMENTS)
        }
        data = {rows: open_data(config, 0, 1) for rows, config in configs.items()}
        config = configs[STREAM.rows]
        context_tokens = config.batch.context_tokens
        model = ReverseGPT(config.model.resolved(), data[STREAM.rows].codec.vocab_size)
        model.initialize(0)
        model.train()
        times: dict[str, list[float]] = {rows: [] for rows in data}
        for step in range(_WARMUP_STEPS + num_steps):
            for rows in sorted(data, reverse=bool(step % 2)):
                started = process_time()
                for batch in data[rows].training.at(step):
                    arguments = to_device(batch, torch.device("cpu"), context_tokens)
                    model(*arguments).sum().backward()
                times[rows].append(process_time() - started)
                model.zero_grad()
        found = {rows: of_rows[_WARMUP_STEPS:] for rows, of_rows in times.items()}
        write_text(path, json.dumps(found) + "\n")
    measured: dict[str, list[float]] = json.loads(path.read_text(encoding="utf-8"))
    return measured


def result_of(
    folder: Folder, shards: Path, way: Way, direction: str, seed: int, steps: int
) -> dict[str, Any]:
    """Train and measure one model, unless it has been."""
    path = folder.out / "runs" / f"{way.name}-{direction}-seed{seed}"
    measured = path.with_suffix(".json")
    if not measured.exists():
        overrides = (f"data.direction={direction}", f"data.rows={way.rows}")
        if way.is_of_equal_time:
            overrides = (*overrides, f"training.steps={steps}")
        cpu_s = folder.train(path, shards, *overrides, seed=seed)
        lines = read_metrics(path)
        fields = {
            "stream": [line["val_loss"] for line in lines if "val_loss" in line][-1],
            "beginnings": loss_of_beginnings(path, shards, Direction(direction)),
            "targets": sum(line["targets"] for line in lines if "targets" in line),
            "cpu_s": cpu_s,
        }
        write_text(measured, json.dumps(fields) + "\n")
    found: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
    return found


def print_table(
    direction: str, results: dict[Way, list[dict[str, Any]]], steps: dict[Way, int]
) -> None:
    """Print the losses of a direction, and their differences from the stream's, of each seed."""
    stream = results[STREAM]
    for way, of_way in results.items():
        losses = [cell([one[key] for one in of_way], 4) for key in _LOSSES]
        title = f"{direction}, {way.rows}, {steps[way]:,} steps"
        click.echo(f"{title:<38}{losses[0]:<22}{losses[1]}")
        if way is STREAM:
            continue
        differences = [
            cell([one[key] - other[key] for one, other in zip(of_way, stream, strict=True)], 4)
            for key in _LOSSES
        ]
        kind = "equal CPU time" if way.is_of_equal_time else "equal tokens"
        targets = sum(one["targets"] for one in of_way) / sum(one["targets"] for one in stream)
        click.echo(
            f"{f'  difference at {kind}':<38}{differences[0]:<22}{differences[1]}"
            f"  ({targets:.3f} times as many targets)"
        )


def ratios_of(times: dict[str, list[float]]) -> Sequence[float]:
    """CPU time of each step on whole documents, relative to the same step on the stream."""
    pairs = zip(times[DOCUMENTS.rows], times[STREAM.rows], strict=True)
    return [documents / stream for documents, stream in pairs]


@click.command(
    cls=Benchmark,
    smoke="--shards {shards} --out {out} --config {config} --direction backward --num-seeds 1 "
    "--steps 1 --timed-steps 2",
)
@click.option("--shards", type=click.Path(path_type=Path), required=True, help="Data set.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder to write.")
@click.option(
    "--config",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    default=Path(__file__).with_suffix(".yaml"),
    help="Config of the models. Default: document_rows.yaml beside this file.",
)
@click.option(
    "--num-seeds", type=COUNT.option, default=3, show_default=True, help="Training seeds."
)
@click.option(
    "--direction",
    "directions",
    type=click.Choice(DIRECTIONS),
    multiple=True,
    default=DIRECTIONS,
    show_default=True,
    help="Directions to train. May be repeated.",
)
@click.option("--steps", type=COUNT.option, help="Steps of each run. Default: the config's.")
@click.option(
    "--timed-steps",
    type=COUNT.option,
    default=60,
    show_default=True,
    help="Steps whose CPU time is measured, of each way of cutting.",
)
def main(
    shards: Path,
    out: Path,
    config: Path,
    num_seeds: int,
    directions: tuple[str, ...],
    steps: int | None,
    timed_steps: int,
) -> None:
    """Print val losses of both ways of cutting rows, for both directions."""
    folder = Folder(out, config, directions, num_seeds, steps)
    folder.claim(shards=DataSet.open(shards).manifest.fingerprint)
    settings = load_config(config)
    context_tokens, run_steps = settings.batch.context_tokens, steps or settings.training.steps
    if run_steps is None:
        raise ConfigError(f"{config} has no training.steps; set it, or give --steps")
    totals = open_document_index(DataSet.open(shards), "train", context_tokens).totals
    click.echo(f"context {context_tokens:,}: {totals.describe()}")
    lengths: dict[str, dict[Way, int]] = {}
    for direction in directions:
        ratios = ratios_of(step_cpu_s(folder, shards, direction, timed_steps))
        in_time = max(1, round(run_steps / median(ratios)))
        lengths[direction] = {
            STREAM: run_steps,
            DOCUMENTS: run_steps,
            DOCUMENTS_IN_TIME: in_time,
        }
        click.echo(
            f"{direction}: the rows and gradients of a step on whole documents take "
            f"{median(ratios):.3f} times the CPU time (mean of {len(ratios)} pairs of steps "
            f"{cell(ratios, 3)})"
        )
    found: dict[str, dict[Way, list[dict[str, Any]]]] = {
        direction: {way: [] for way in lengths[direction]} for direction in directions
    }
    for seed in range(num_seeds):
        for direction in directions:
            for way, way_steps in lengths[direction].items():
                result = result_of(folder, shards, way, direction, seed, way_steps)
                found[direction][way].append(result)
    click.echo(f"{'trained on':<38}{'val set as a stream':<22}beginnings of documents")
    for direction, results in found.items():
        print_table(direction, results, lengths[direction])
    click.echo(cpu_line(one for of in found.values() for some in of.values() for one in some))


if __name__ == "__main__":
    main()
