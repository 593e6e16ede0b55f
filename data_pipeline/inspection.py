"""`megaback shards inspect`: what a data set holds, and any document of it as text."""

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import numpy as np
import numpy.typing as npt

from data_pipeline.command import Command
from data_pipeline.errors import ConfigError
from data_pipeline.manifest import SPLITS, Manifest
from data_pipeline.shard_format import ShardReader


def document_ids(
    folder: Path, manifest: Manifest, split: str
) -> Iterator[npt.NDArray[np.unsignedinteger[Any]]]:
    """The ids of every document of a split, markers included, in stored order."""
    for entry in manifest.split(split):
        reader = ShardReader(folder / entry.file)
        start = 0
        for tokens in reader.document_tokens().tolist():
            yield reader.tokens(start, start + tokens)
            start += tokens
        reader.close()


def document_at(
    folder: Path, manifest: Manifest, split: str, number: int
) -> npt.NDArray[np.unsignedinteger[Any]]:
    """The ids of one document, counted from 0. Raises ConfigError past the split's end."""
    before = 0
    for entry in manifest.split(split):
        if number < before + entry.documents:
            reader = ShardReader(folder / entry.file)
            stops = np.cumsum(reader.document_tokens())
            stop = int(stops[number - before])
            start = int(stops[number - before - 1]) if number > before else 0
            ids = reader.tokens(start, stop)
            reader.close()
            return ids
        before += entry.documents
    raise ConfigError(f"--document is {number}, but the {split} set has {before} documents")


def unigram_entropy(folder: Path, manifest: Manifest, split: str) -> float:
    """Entropy of a split's tokens in nats a token: the loss of the best model without context.

    Begin markers are left out: they are never predicted.
    """
    counts = np.zeros(manifest.vocab_size, dtype=np.int64)
    for entry in manifest.split(split):
        reader = ShardReader(folder / entry.file)
        for frame in range(reader.num_frames):
            counts += np.bincount(reader.frame(frame), minlength=manifest.vocab_size)
        reader.close()
    counts[manifest.begin_id] = 0
    probabilities = counts[counts > 0] / counts.sum()
    return float(-(probabilities * np.log(probabilities)).sum())


@click.command(cls=Command, name="inspect")
@click.argument("shards", type=click.Path(path_type=Path))
@click.option("--split", type=click.Choice(SPLITS), default="train", show_default=True)
@click.option("--document", type=click.IntRange(min=0), help="Show one document of the split.")
@click.option("--stored", is_flag=True, help="Show its pieces in stored order, not its text.")
def main(shards: Path, split: str, document: int | None, stored: bool) -> None:
    """Show what a data set holds, or one of its documents."""
    manifest = Manifest.load(shards)
    if document is not None:
        codec = manifest.codec(shards)
        ids = document_at(shards, manifest, split, document)
        if stored:
            click.echo(" ".join(codec.piece(int(piece_id)) for piece_id in ids))
        else:
            click.echo(codec.render(ids).encode("utf-8", "surrogatepass"), nl=False)
        return
    text_format = manifest.text_format
    click.echo(f"data set     {shards}")
    click.echo(f"source       {manifest.source}")
    click.echo(f"direction    {text_format.direction.value}, unit {text_format.unit.value}")
    click.echo(
        f"tokenizer    {manifest.vocab_size:,} pieces, sha256 {text_format.tokenizer_sha256[:16]}"
    )
    click.echo(f"frames       {manifest.frame_tokens:,} tokens")
    click.echo(f"fingerprint  {manifest.fingerprint}")
    for name in SPLITS:
        total = manifest.total(name)
        if not total["tokens"]:
            click.echo(f"{name:<12} empty")
            continue
        entropy = unigram_entropy(shards, manifest, name)
        raw_bytes = total["tokens"] * manifest.id_bytes
        click.echo(
            f"{name:<12} {total['shards']} shards, {total['documents']:,} documents, "
            f"{total['tokens']:,} tokens; {total['text_bytes'] / total['tokens']:.2f} bytes of "
            f"text a token, files at {total['file_bytes'] / raw_bytes:.2f} of the raw ids; "
            f"unigram entropy {entropy:.3f} nats ({entropy / math.log(2):.2f} bits) a token"
        )


if __name__ == "__main__":
    main()
