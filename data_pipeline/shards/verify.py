"""`megaback shards verify`: decodes and re-hashes every shard of a manifest."""

import hashlib
from pathlib import Path

import click
import numpy as np
import numpy.typing as npt

from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.file_hash import file_sha256
from data_pipeline.common.interrupts import require_uninterrupted
from data_pipeline.common.shared_options import workers_option
from data_pipeline.errors import ShardCorruptError
from data_pipeline.shards.data_set import DataSet, changed_shard
from data_pipeline.shards.manifest import Manifest, ShardEntry, shard_path
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.traversal import on_threads


def shard_damage(folder: Path, entry: ShardEntry, data_set: DataSet) -> list[ShardCorruptError]:
    """All damage of a shard; errors name the file, and frame and byte offset if known."""
    try:
        reader = data_set.open_shard(entry)
    except ShardCorruptError as error:
        return [error]
    damage: list[ShardCorruptError] = []
    content = hashlib.sha256()
    with reader:
        for frame in range(reader.num_frames):
            require_uninterrupted()
            try:
                content.update(reader.frame(frame).data)
            except ShardCorruptError as error:
                damage.append(error)
        try:
            counts = reader.stored_counts()
            content.update(counts.data)
            if data_set.manifest.row_tokens is not None:
                _require_counted(reader, counts, entry)
        except ShardCorruptError as error:
            damage.append(error)
    if damage:
        return damage  # the hash would only repeat it
    hashes = (content.hexdigest(), file_sha256(shard_path(folder, entry)))
    if hashes != (entry.content_sha256, entry.file_sha256):
        return [changed_shard(reader)]
    return []


def _require_counted(
    reader: ShardReader, counts: npt.NDArray[np.uint32], entry: ShardEntry
) -> None:
    """Raises ShardCorruptError unless a shard of examples has the token counts of its entry."""
    tokens, given, loss_tokens = counts.sum(axis=0, dtype=np.int64).tolist()
    counted = (loss_tokens, tokens - given - loss_tokens)
    promised = (entry.loss_tokens, entry.padding_tokens)
    if counted != promised:
        raise ShardCorruptError(
            f"the shard {reader.shown} is not the one in the manifest, which has tokens with loss "
            f"and of padding {promised}, not {counted}; restore the one that changed or build the "
            "shards again"
        )


def verify_data_set(folder: Path, workers: int | None = None) -> Manifest:
    """Verify a folder of shards; raises the first damage, and prints the rest to stderr.

    Raises ShardCorruptError, or what DataSet.open and DataSet.codec raise.
    """
    data_set = DataSet.open(folder)
    manifest = data_set.manifest
    data_set.codec()  # compares the tokenizer with the manifest
    data_set.require_dictionary()  # reported once, rather than for every shard

    def check(entry: ShardEntry) -> list[ShardCorruptError]:
        return shard_damage(folder, entry, data_set)

    found = dict(on_threads(check, manifest.shards, workers, "verifying"))
    damaged = [entry for entry in manifest.shards if found[entry]]
    if damaged:
        first, *others = [error for entry in damaged for error in found[entry]]
        for error in others:
            click.echo(str(error), err=True)
        more = f" (and {_count(len(damaged) - 1, 'other shard')})" if len(damaged) > 1 else ""
        raise ShardCorruptError(str(first) + more)
    return manifest


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


@click.command(
    cls=WorkCommand,
    name="verify",
    epilog=examples(
        "megaback shards verify data/fineweb-100bt",
        "megaback shards verify data/fineweb-100bt --workers 4",
    ),
)
@click.argument("shards", type=click.Path(path_type=Path))
@workers_option("threads")
def main(shards: Path, workers: int | None) -> None:
    """Decode and re-hash every shard of the data set SHARDS; report all damage."""
    manifest = verify_data_set(shards, workers)
    tokens = sum(entry.tokens for entry in manifest.shards)
    click.echo(
        f"{len(manifest.shards)} shards, {tokens:,} tokens: "
        "every frame decodes and every hash agrees"
    )


if __name__ == "__main__":
    main()
