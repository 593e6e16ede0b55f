"""Rows of whole documents or of a stream: val losses of models that were trained on either.

    python benchmarks/document_rows.py --shards data/prose --out runs/document_rows

One model per seed, direction and way of cutting, on the same number of tokens, in turns. Measured
are the run's val loss, over all tokens of the val set as a stream; the loss over the beginning of
every document of the val set in reading order, as much as a row holds; and the time of a step.
Differences are paired by seed. The same command resumes.
"""

import json
from collections.abc import Sequence
from functools import partial
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import click
import numpy as np
from controlled.runner import DIRECTIONS, Folder, cell, cpu_line
from smoke import Benchmark

from data_pipeline.common.atomic import write_text
from data_pipeline.common.number_ranges import COUNT
from data_pipeline.loading.document_index import open_document_index
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import Direction
from megaback.config_file import load_config
from megaback.run_folder import complete_checkpoints
from megaback.tracking.metrics import read_metrics

ROWS = ("stream", "documents")


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


def result_of(folder: Folder, shards: Path, rows: str, direction: str, seed: int) -> dict[str, Any]:
    """Train and measure one model, unless it has been."""
    path = folder.out / "runs" / f"{rows}-{direction}-seed{seed}"
    measured = path.with_suffix(".json")
    if not measured.exists():
        overrides = (f"data.direction={direction}", f"data.rows={rows}")
        cpu_s = folder.train(path, shards, *overrides, seed=seed)
        lines = read_metrics(path)
        fields = {
            "stream": [line["val_loss"] for line in lines if "val_loss" in line][-1],
            "beginnings": loss_of_beginnings(path, shards, Direction(direction)),
            "step_s": median(line["step_s"] for line in lines if "step_s" in line),
            "targets": sum(line["targets"] for line in lines if "targets" in line),
            "cpu_s": cpu_s,
        }
        write_text(measured, json.dumps(fields) + "\n")
    found: dict[str, Any] = json.loads(measured.read_text(encoding="utf-8"))
    return found


def differences(results: dict[str, list[dict[str, Any]]], key: str) -> Sequence[float]:
    """Value with whole documents less that of a stream, of each seed."""
    pairs = zip(results["documents"], results["stream"], strict=True)
    return [documents[key] - stream[key] for documents, stream in pairs]


@click.command(
    cls=Benchmark,
    smoke="--shards {shards} --out {out} --config {config} --direction backward --num-seeds 1 "
    "--steps 1",
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
def main(
    shards: Path,
    out: Path,
    config: Path,
    num_seeds: int,
    directions: tuple[str, ...],
    steps: int | None,
) -> None:
    """Print val losses of both ways of cutting rows, for both directions."""
    folder = Folder(out, config, directions, num_seeds, steps)
    folder.claim(shards=DataSet.open(shards).manifest.fingerprint)
    context_tokens = load_config(config).batch.context_tokens
    totals = open_document_index(DataSet.open(shards), "train", context_tokens).totals
    click.echo(f"context {context_tokens:,}: {totals.describe()}")
    result = partial(result_of, folder, shards)
    found: dict[str, dict[str, list[dict[str, Any]]]] = {
        direction: {rows: [] for rows in ROWS} for direction in directions
    }
    for seed, direction, rows in product(range(num_seeds), directions, ROWS):
        found[direction][rows].append(result(rows, direction, seed))
    click.echo(f"{'trained on':<24}{'val set as a stream':<22}beginnings of documents")
    for direction in directions:
        results = found[direction]
        for rows in ROWS:
            losses = [
                cell([one[key] for one in results[rows]], 4) for key in ("stream", "beginnings")
            ]
            click.echo(f"{f'{direction}, {rows}':<24}{losses[0]:<22}{losses[1]}")
        both = [cell(differences(results, key), 4) for key in ("stream", "beginnings")]
        click.echo(f"{'  difference':<24}{both[0]:<22}{both[1]}")
        ratios = [
            documents["step_s"] / stream["step_s"]
            for documents, stream in zip(results["documents"], results["stream"], strict=True)
        ]
        targets = np.mean([one["targets"] for one in results["documents"]]) / np.mean(
            [one["targets"] for one in results["stream"]]
        )
        click.echo(
            f"  a step on whole documents takes {cell(ratios, 3)} times as long, for {targets:.3f} "
            "times as many targets"
        )
    click.echo(cpu_line(one for of in found.values() for some in of.values() for one in some))


if __name__ == "__main__":
    main()
