"""`megaback shards locate`: the steps at which a run reads a document.

The order of training is an invertible function: a document maps to its rows, and a row and an epoch
to a step and a position in its batch. Only a document given by its text is searched for.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import click
import numpy as np
import numpy.typing as npt

from data_pipeline.common.checked_json import read_json
from data_pipeline.common.command import Command, examples
from data_pipeline.common.number_ranges import COUNT_OR_ZERO, MANY, MAX_EPOCH
from data_pipeline.common.shared_options import json_option
from data_pipeline.errors import (
    CheckpointCorruptError,
    ConfigError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.loading.directions import are_forward
from data_pipeline.loading.document_index import DocumentIndex
from data_pipeline.loading.loader import Stream
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.order import Indices, require_order_version
from data_pipeline.shards.document_search import (
    StoredDocument,
    document_by_number,
    documents_with_ids,
)
from data_pipeline.shards.manifest import SPLITS
from megaback.config_file import load_config
from megaback.data import Data, open_data
from megaback.faults.run_ownership import config_of_run
from megaback.run_folder import META_NAME, complete_checkpoints

_Ids = npt.NDArray[np.unsignedinteger[Any]]


@dataclass(frozen=True)
class DocumentRows:
    """The rows of a split that hold a document, in its stored order: arrays of shape (rows,).

    Tokens `start` to `stop` of the document are among the `context_tokens` ids of a row. (The
    window of a row includes the first id of the next row as a target; it counts for the next row.
    Rows are the same in both directions.)
    """

    frame: Indices
    row: Indices
    start: Indices
    stop: Indices


@dataclass(frozen=True)
class RowUse:
    """A row in which a run reads tokens `start` to `stop` of a document.

    `step` counts from 1, as in metrics.jsonl.
    """

    step: int
    position: int
    rank: int | None
    """Rank that reads the row, or the first of those that share it."""
    start: int
    stop: int
    is_reached: bool
    is_of_trunk: bool
    """Whether the trunk of a branch has read it; step and position are then of the branch's batch,
    counted back."""


def rows_of_document(
    document: StoredDocument, shard_tokens: Indices, frame_tokens: int, context_tokens: int
) -> DocumentRows:
    """The stored rows that hold a document; `shard_tokens` has shape (shards,)."""
    frames_of_shard = -(-shard_tokens // frame_tokens)
    first_frame = int(frames_of_shard[: document.shard].sum())
    # Frames hold whole rows, so rows can be numbered through a shard.
    of_shard = np.arange(
        document.start // context_tokens, (document.stop - 1) // context_tokens + 1
    )
    frame, row = np.divmod(of_shard, frame_tokens // context_tokens)
    first = of_shard * context_tokens
    return DocumentRows(
        frame=first_frame + frame,
        row=row,
        start=np.maximum(first, document.start) - document.start,
        stop=np.minimum(first + context_tokens, document.stop) - document.start,
    )


def row_of_whole_document(
    stream: Stream, index: DocumentIndex, document: StoredDocument, epoch: int
) -> DocumentRows:
    """The row that holds a document, of which it reads one end if it is longer than a row.

    Its last token may only be a target.
    """
    before = int(stream.rows.frames.shard_tokens[: document.shard].sum())
    frame, row = (np.array([place]) for place in index.find(before + document.start))
    is_flipped = stream.rows.is_flipped
    if stream.forward_share is not None:
        step, position = stream.order.find(np.full_like(frame, epoch), frame, row)
        is_forward_N = are_forward(step, position, stream.forward_share)
        is_flipped = bool(stream.rows.are_flipped(is_forward_N)[0])
    tokens = document.stop - document.start
    read = min(tokens, stream.rows.context_tokens + 1)
    start = np.array([tokens - read if is_flipped else 0])
    return DocumentRows(frame=frame, row=row, start=start, stop=start + read)


def batches_of_rows(
    streams: Sequence[Stream],
    mixture: Mixture,
    global_batch_rows: int,
    data_set: int,
    rows: DocumentRows,
    epoch: int,
) -> tuple[Indices, Indices]:
    """Step, from 0, and position in its global batch, of stored rows in an epoch; or a step below 0
    for a row that no step reads, however long the run.

    The epoch is that of the data set; epochs of a mixture's data sets may differ.
    """
    stream = streams[data_set]
    frame, row = stream.table.place_of(rows.frame, rows.row)
    step, position = stream.order.find(np.full_like(frame, epoch), frame, row)
    number = mixture.number_of(data_set, step * stream.order.global_batch_rows + position)
    step = number // global_batch_rows
    return step, number - step * global_batch_rows


def uses_of_document(
    data: Data,
    document: StoredDocument,
    global_batch_rows: int,
    epoch: int,
    world_size: int | None,
    sequence_parallel: int = 1,
) -> list[RowUse]:
    """Every row of an epoch with a part of a document of the train set, by step."""
    groups = None if world_size is None else world_size // sequence_parallel
    stream = data.streams[document.data_set]
    if isinstance(stream.table, DocumentIndex):
        rows = row_of_whole_document(stream, stream.table, document, epoch)
    else:
        frames, context_tokens = stream.rows.frames, stream.rows.context_tokens
        frame_tokens = frames.manifest.frame_tokens
        rows = rows_of_document(document, frames.shard_tokens, frame_tokens, context_tokens)
    step, position = batches_of_rows(
        data.streams, data.mixture, global_batch_rows, document.data_set, rows, epoch
    )
    columns = (step - data.read_steps, position, rows.start, rows.stop)
    first_step = 0 if data.branch is None else data.branch.step
    return [
        RowUse(
            step=of_row + 1,
            position=at,
            rank=None if groups is None else at * groups // global_batch_rows * sequence_parallel,
            start=start,
            stop=stop,
            is_reached=of_row < data.total_steps,
            is_of_trunk=of_row < first_step,
        )
        for of_row, at, start, stop in sorted(
            zip(*(column.tolist() for column in columns), strict=True)
        )
        if of_row >= 0
    ]


def _require_order_of_run(run: Path) -> None:
    """Raises RunMismatchError for a run of another version of the order."""
    for checkpoint in complete_checkpoints(run)[-1:]:
        path = checkpoint / META_NAME
        try:
            version = read_json(path).get("order_version", 1)
        except (OSError, ValueError, AttributeError) as error:
            raise CheckpointCorruptError(
                f"{path} cannot be read ({error}), which has the version of the run's order; "
                "restore it, or name the run's config file"
            ) from None
        require_order_version(version, str(run))


def _read_text(file: IO[bytes]) -> str:
    try:
        return file.read().decode("utf-8", "surrogatepass")  # as `shards inspect` writes it
    except UnicodeDecodeError as error:
        raise SourceUnreadableError(
            f"the --text is not UTF-8 at byte {error.start}; convert it to UTF-8 first"
        ) from None


def _find_text(data: Data, split: str, text: str) -> list[StoredDocument]:
    data_sets = [stream.rows.frames.data_set for stream in data.streams]
    ids = data.codec.encode_document(text)
    found = documents_with_ids(data_sets, split, ids)
    if found:
        return found
    names = ", ".join(data_set.name for data_set in data_sets)
    message = f"no document of the {split} set of {names} has exactly this text"
    for other in SPLITS:
        elsewhere = documents_with_ids(data_sets, other, ids) if other != split else []
        if elsewhere:
            first = elsewhere[0]
            message += (
                f"; it is document {first.number} of the {other} set of "
                f"{data_sets[first.data_set].name}"
            )
    if text.endswith("\n"):
        message += "; it ends with a line break, which is compared too: remove it if it is extra"
    raise SourceMissingError(message)


def _find_number(data: Data, split: str, number: int, shards: str | None) -> StoredDocument:
    data_sets = [stream.rows.frames.data_set for stream in data.streams]
    if len(data_sets) == 1 and shards is None:
        return document_by_number(data_sets[0], split, number)
    for of_run, data_set in enumerate(data_sets):
        if data_set.name == shards:
            return document_by_number(data_set, split, number, of_run)
    names = ", ".join(data_set.name for data_set in data_sets)
    raise ConfigError(
        f"--document {number} of a mixture needs --shards, one of the run's data sets: {names}"
    )


def _describe_document(data: Data, split: str, document: StoredDocument) -> dict[str, Any]:
    data_set = data.streams[document.data_set].rows.frames.data_set
    return {
        "data_set": data_set.name,
        "document": document.number,
        "tokens": document.stop - document.start,
        "shard": data_set.manifest.split(split)[document.shard].file,
        "shard_tokens": [document.start, document.stop],
    }


def _show(
    facts: dict[str, Any],
    split: str,
    epoch: int,
    uses: Sequence[RowUse],
    total_steps: int,
    is_whole: bool,
) -> None:
    """`is_whole`: whether the rows of the train set are of whole documents."""
    start, stop = facts["shard_tokens"]
    click.echo(
        f"document {facts['document']:,} of the {split} set of {facts['data_set']}: "
        f"{facts['tokens']:,} tokens, {start:,} to {stop - 1:,} of {facts['shard']}"
    )
    if split != "train":
        click.echo(f"no step reads it: the {split} set is for validation, not for training")
        return
    click.echo(
        f"epoch {epoch}; steps as in metrics.jsonl; rows, ranks and tokens, as stored, from 0:"
    )
    for use in uses:
        rank = "" if use.rank is None else f", rank {use.rank}"
        reached = "" if use.is_reached else f"; not reached, the run has {total_steps:,} steps"
        where = f"step {use.step:,}, row {use.position:,} of the batch{rank}"
        if use.is_of_trunk:
            where = "before the branch, by its trunk"
        click.echo(f"  {where}: tokens {use.start:,} to {use.stop - 1:,}{reached}")
    if sum(use.stop - use.start for use in uses) < facts["tokens"]:
        rest = "the rest of it" if uses else "it"
        reason = "its data set has weight 0, or was dropped, by then"
        if uses and is_whole:  # in one row, or in none
            reason = "the document is longer than a row"
        click.echo(f"  no step reads {rest}: {reason}")


@click.command(
    cls=Command,
    name="locate",
    epilog=examples(
        "megaback shards locate runs/xcoax_100bt --document 1234",
        "megaback shards locate configs/demo.yaml --text - --epoch 1 --json < page.txt",
    ),
)
@click.argument("config", metavar="CONFIG_OR_RUN", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--document",
    type=COUNT_OR_ZERO.option,
    help="Index of the document in its split, as of `megaback shards inspect`.",
)
@click.option(
    "--text", type=click.File("rb"), help="File with the document's text only; - for stdin."
)
@click.option("--shards", type=click.Path(), help="Data set of --document, in a mixture.")
@click.option(
    "--split",
    type=click.Choice(SPLITS),
    default="train",
    show_default=True,
    help="Split of the document.",
)
@click.option(
    "--epoch",
    type=MAX_EPOCH.option,
    default=0,
    show_default=True,
    help="Epoch, counted from 0.",
)
@click.option(
    "--world-size",
    type=MANY.option,
    help="Number of ranks of the run, to show which rank reads the document.",
)
@json_option
def main(
    config: Path,
    overrides: tuple[str, ...],
    document: int | None,
    text: IO[bytes] | None,
    shards: str | None,
    split: str,
    epoch: int,
    world_size: int | None,
    as_json: bool,
) -> None:
    """Show the steps at which the run of CONFIG_OR_RUN, with OVERRIDES, reads a document.

    CONFIG_OR_RUN is a config file or the folder of a run; OVERRIDES are key.sub=value. A text that
    is equal to several documents is located in each; if there is none, the exit code is 20.
    """
    if (document is None) == (text is None):
        raise ConfigError("give exactly one of --document and --text")
    if shards is not None and document is None:
        raise ConfigError(
            "--shards needs --document; --text searches all data sets, so remove --shards"
        )
    if config.is_dir():
        _require_order_of_run(config)
    path = config_of_run(config) if config.is_dir() else config
    settings = load_config(path, overrides)
    if config.is_dir():
        settings = settings.model_copy(update={"run": config})  # it may have been moved
    parts = settings.batch.sequence_parallel
    groups = 1 if world_size is None else settings.batch.row_groups(world_size)
    data = open_data(settings.undivided(), 0, groups)
    if text is not None:
        found = _find_text(data, split, _read_text(text))
    else:
        found = [_find_number(data, split, document or 0, shards)]
    rows = settings.batch.global_batch_rows
    described = [_describe_document(data, split, one) for one in found]
    uses = [
        uses_of_document(data, one, rows, epoch, world_size, parts) if split == "train" else []
        for one in found
    ]
    if as_json:
        for facts, of_one in zip(described, uses, strict=True):
            facts["rows"] = [vars(use) for use in of_one]
        fields = {"split": split, "epoch": epoch, "total_steps": data.total_steps}
        click.echo(json.dumps({**fields, "documents": described}))
        return
    for facts, of_one in zip(described, uses, strict=True):
        _show(facts, split, epoch, of_one, data.total_steps, settings.data.rows == "documents")


if __name__ == "__main__":
    main()
