"""`megaback shards score`: quality of each document of a data set, as JSON lines."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.output_paths import json_lines_with, overwrite_option, require_output
from data_pipeline.common.rich_console import SafeConsole, SafeProgress
from data_pipeline.common.terminal import echo
from data_pipeline.errors import SourceEmptyError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import SPLITS
from data_pipeline.sources.line_writer import writing_lines
from tools.model_options import devices_option, dtype_option
from tools.score import out_option

if TYPE_CHECKING:
    from megaback.scoring.directions import Ids

_Place = dict[str, Any]


def documents_with_places(data_set: DataSet, split: str) -> "Iterator[tuple[_Place, Ids]]":
    """Each document of a split with the fields that identify it."""
    from megaback.scoring.directions import documents_of_shard

    number = 0
    for entry in data_set.manifest.split(split):
        for ids in documents_of_shard(data_set, entry):
            yield {"split": split, "shard": entry.file, "document": number}, ids
            number += 1


@click.command(
    cls=Command,
    name="score",
    epilog=examples(
        "megaback shards score data/prose --forward models/forward --backward models/backward "
        "--out quality.jsonl",
        "megaback shards score data/prose --split val --forward runs/forward "
        "--backward runs/backward --out - --device cuda:0,cuda:1",
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
@devices_option
@dtype_option
def main(
    shards: str,
    forward: Path,
    backward: Path,
    split: str,
    out: str,
    overwrite: bool,
    device: str | None,
    dtype: str,
) -> None:
    """Score each document of the data set SHARDS by two models that were trained alike, one
    forward, one backward: forward less backward loss, in nats per token.

    The highest values are the best documents for `megaback shards select`.
    """
    is_ours = json_lines_with(document=int, quality=float)
    require_output(out, (shards, forward, backward), is_ours=is_ours, overwrite=overwrite)
    data_set = DataSet.open(shards)
    num_documents = data_set.manifest.total(split)["documents"]
    if not num_documents:
        raise SourceEmptyError(f"the {split} set of {shards} is empty; choose another --split")
    from megaback.scoring.quality import QualityScorer

    tokens, nats, console = 0, 0.0, SafeConsole(stderr=True)
    with (
        QualityScorer.load(forward, backward, data_set, device, dtype) as scorer,
        writing_lines(out, overwrite=overwrite) as writer,
        SafeProgress(console=console, transient=True, disable=not console.is_terminal) as progress,
    ):
        bar = progress.add_task(f"{split} documents", total=num_documents)
        for place, found in scorer.score(documents_with_places(data_set, split)):
            writer.write({**place, **found.to_dict()})
            tokens += found.tokens
            nats += found.forward_nats - found.backward_nats
            progress.advance(bar)
    echo(
        f"{num_documents:,} documents, {tokens:,} tokens scored in {scorer.dtype}; forward less "
        f"backward loss {nats / max(tokens, 1):+.4f} nats/token",
        err=True,
    )


if __name__ == "__main__":
    main()
