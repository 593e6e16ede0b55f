"""`megaback shards verify`: decode and re-hash everything that a manifest promises."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

from data_pipeline.command import Command
from data_pipeline.errors import ShardCorruptError
from data_pipeline.manifest import Manifest, ShardEntry
from data_pipeline.shard_format import ShardReader


def verify_shard(folder: Path, entry: ShardEntry, manifest: Manifest) -> None:
    """Raises ShardCorruptError naming the file, and frame and byte offset where they are known."""
    reader = ShardReader(folder / entry.file)
    try:
        header = reader.header
        said = (header.direction, header.unit, header.tokenizer_sha256, header.frame_tokens)
        text_format = manifest.text_format
        expected = (
            text_format.direction.value,
            text_format.unit.value,
            text_format.tokenizer_sha256,
            manifest.frame_tokens,
        )
        if said != expected:
            raise ShardCorruptError(
                f"the shard {reader.path} belongs to another data set: it says {said}, "
                f"the manifest {expected}; restore it or build the shards again"
            )
        counted = (header.tokens, header.documents, header.text_bytes, header.id_bytes)
        promised = (entry.tokens, entry.documents, entry.text_bytes, manifest.id_bytes)
        if (*counted, reader.file_bytes) != (*promised, entry.file_bytes):
            raise ShardCorruptError(
                f"the shard {reader.path} and the manifest disagree on its numbers: "
                f"{(*counted, reader.file_bytes)} and {(*promised, entry.file_bytes)}; "
                "restore the one that changed or build the shards again"
            )
        content_sha256 = reader.content_sha256()  # decodes every frame, so it names a broken one
    finally:
        reader.close()
    with reader.path.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(1 << 20):
            digest.update(block)
    if (content_sha256, digest.hexdigest()) != (entry.content_sha256, entry.file_sha256):
        raise ShardCorruptError(
            f"the shard {reader.path} is intact but is not the one in the manifest; "
            "restore it or build the shards again"
        )


@click.command(cls=Command, name="verify")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--workers", type=click.IntRange(min=1), help="Threads; default: every core.")
def main(shards: Path, workers: int | None) -> None:
    """Decode and re-hash every shard of a data set; name what is broken."""
    manifest = Manifest.load(shards)
    manifest.codec(shards)  # reads the tokenizer, and compares it with the manifest
    broken: list[str] = []
    # Decompression and hashing release the interpreter's lock, so threads are enough.
    with ThreadPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        checks = [pool.submit(verify_shard, shards, entry, manifest) for entry in manifest.shards]
        for check in checks:
            error = check.exception()
            if isinstance(error, ShardCorruptError):
                broken.append(str(error))
            elif error is not None:
                raise error
    if broken:
        others = f" (and {len(broken) - 1} other shards)" if len(broken) > 1 else ""
        for message in broken[1:]:
            click.echo(message, err=True)
        raise ShardCorruptError(broken[0] + others)
    tokens = sum(entry.tokens for entry in manifest.shards)
    click.echo(
        f"{len(manifest.shards)} shards, {tokens:,} tokens: "
        "every frame decodes and every hash agrees"
    )


if __name__ == "__main__":
    main()
