"""`megaback shards score`: quality of each document of a data set, as JSON lines.

Scores are stored in chunks in a work folder beside the output; after a kill, the same command
resumes. Tasks share the documents. The output's bytes do not depend on kills, tasks or the number
of devices.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.output_paths import overwrite_option
from data_pipeline.common.rich_console import SafeConsole, SafeProgress
from data_pipeline.common.terminal import echo
from data_pipeline.errors import SourceEmptyError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import SPLITS
from tools.model_options import devices_option, dtype_option
from tools.resumable_output import (
    ResumableOutput,
    converted,
    identity,
    out_option,
    task_index_option,
    tasks_option,
)

if TYPE_CHECKING:
    from megaback.scoring.directions import Ids
    from megaback.scoring.quality import QualityScorer

_FORMAT = {"format": "megaback-document-scores", "version": 1}
_CHUNK_TOKENS = 1 << 20
"""Tokens after which a chunk ends: one is lost by a kill."""
_CHUNK_DOCUMENTS = 1 << 16
"""Maximum number of documents of a chunk, which is one line of a file."""
_Place = dict[str, Any]


def documents_with_places(data_set: DataSet, split: str) -> "Iterator[tuple[_Place, Ids]]":
    """Each document of a split with the fields that identify it."""
    from megaback.scoring.directions import documents_of_shard

    number = 0
    for entry in data_set.manifest.split(split):
        for ids in documents_of_shard(data_set, entry):
            yield {"split": split, "shard": entry.file, "document": number}, ids
            number += 1


def _chunks(data_set: DataSet, split: str) -> "Iterator[list[tuple[_Place, Ids]]]":
    chunk: list[tuple[_Place, Ids]] = []
    num_tokens = 0
    for place, ids in documents_with_places(data_set, split):
        chunk.append((place, ids))
        num_tokens += len(ids)
        if num_tokens >= _CHUNK_TOKENS or len(chunk) == _CHUNK_DOCUMENTS:
            yield chunk
            chunk, num_tokens = [], 0
    if chunk:
        yield chunk


@click.command(
    cls=ResumableCommand,
    name="score",
    epilog=examples(
        "megaback shards score data/prose --forward models/forward --backward models/backward "
        "--out quality.jsonl",
        "megaback shards score data/prose --split val --forward runs/forward "
        "--backward runs/backward --out val.jsonl --device cuda:0,cuda:1",
    ),
)
@click.argument("shards", type=click.Path())
@click.option(
    "--forward",
    required=True,
    type=click.Path(path_type=Path),
    help="Forward model: a folder, run or checkpoint.",
)
@click.option(
    "--backward",
    required=True,
    type=click.Path(path_type=Path),
    help="Backward model: a folder, run or checkpoint.",
)
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    default="train",
    show_default=True,
    help="Split to score.",
)
@out_option
@overwrite_option
@tasks_option("documents")
@task_index_option
@devices_option
@dtype_option
def main(
    shards: str,
    forward: Path,
    backward: Path,
    split: str,
    out: Path,
    overwrite: bool,
    tasks: int,
    task_index: int | None,
    device: str | None,
    dtype: str,
) -> None:
    """Score each document of the data set SHARDS by two models that were trained alike, one
    forward, one backward: forward less backward loss, in nats per token.

    The highest values are the best documents for `megaback shards select`. Run the same command
    again to resume.
    """
    output = ResumableOutput(out, tasks, task_index)
    output.require((shards, forward, backward))
    data_set = DataSet.open(shards)
    if not data_set.manifest.split(split):
        raise SourceEmptyError(f"the {split} set of {shards} is empty; choose another --split")
    forward, backward = converted(forward), converted(backward)
    from megaback.scoring.quality import QualityScorer

    with QualityScorer.load(forward, backward, data_set, device, dtype) as scorer:
        plan = {
            **_FORMAT,
            "--forward": identity(forward),
            "--backward": identity(backward),
            "data set": data_set.manifest.fingerprint,
            "--split": split,
            "--tasks": tasks,
            "--dtype": scorer.dtype,  # of `auto`, which another device may choose otherwise
        }
        output.claim(plan)
        for task in output.waiting:
            _do_task(output, task, data_set, split, scorer)
    if output.is_complete():
        totals = _Totals()
        output.write(
            totals.counted(output.results()), overwrite=overwrite, differs="on another device"
        )
        echo(
            f"{out}: {totals.documents:,} documents, {totals.tokens:,} tokens; forward less "
            f"backward loss {totals.nats / max(totals.tokens, 1):+.4f} nats/token"
        )


def _do_task(
    output: ResumableOutput, task: int, data_set: DataSet, split: str, scorer: "QualityScorer"
) -> None:
    """Score the missing chunks of a task."""
    console = SafeConsole(stderr=True)
    with (
        output.chunks(task, _chunks(data_set, split)) as chunks,
        SafeProgress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        total = data_set.manifest.total(split)["documents"]
        bar = progress.add_task(f"{split} documents", total=total)
        for chunk in chunks:
            lines = []
            for place, found in scorer.score(chunk):
                lines.append({**place, **found.to_dict()})
                progress.update(bar, completed=place["document"] + 1)
            output.append(task, lines)


@dataclass
class _Totals:
    """Sums over the lines that are written."""

    documents: int = 0
    tokens: int = 0
    nats: float = 0.0

    def counted(self, lines: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for line in lines:
            self.documents += 1
            self.tokens += line["tokens"]
            self.nats += line["forward_nats"] - line["backward_nats"]
            yield line


if __name__ == "__main__":
    main()
