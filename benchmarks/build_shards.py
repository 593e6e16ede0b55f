"""What building costs over bare SentencePiece: text in memory to a shard on disk, one core.

    python benchmarks/build_shards.py TOKENIZER SOURCE

CPU time, both on the same documents in one run. Ours includes reversal, markers, compression,
checksums, hashing and writing.
"""

import tempfile
import time
from itertools import islice
from pathlib import Path

import click
import sentencepiece

from data_pipeline.command import replacing
from data_pipeline.shard_format import ShardWriter
from data_pipeline.sources import list_slices, read_slice
from data_pipeline.text import Direction, TextCodec, Unit


@click.command()
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("source")
@click.option("--documents", default=1500, show_default=True)
def main(tokenizer: Path, source: str, documents: int) -> None:
    """Print MB of text per CPU-second of both, and their ratio."""
    every = (document.text for piece in list_slices(source) for document in read_slice(piece))
    texts = list(islice(every, documents))
    text_bytes = sum(len(text.encode()) for text in texts)
    codec = TextCodec.load(tokenizer, Direction.BACKWARD, Unit.TOKEN)
    processor = sentencepiece.SentencePieceProcessor(model_proto=codec.model_bytes)

    started = time.process_time()
    for text in texts:
        processor.encode(text)
    bare_s = time.process_time() - started

    started = time.process_time()
    with tempfile.TemporaryDirectory() as folder, replacing(Path(folder) / "shard.zst") as file:
        writer = ShardWriter(file, codec.format.to_dict(), codec.id_dtype)
        for text in texts:
            writer.add(codec.encode_document(text), len(text.encode()))
        digest = writer.finish()
    ours_s = time.process_time() - started

    click.echo(
        f"sentencepiece {sentencepiece.__version__}, {len(texts):,} documents, "
        f"{text_bytes / 1e6:.1f} MB, {digest.tokens:,} tokens"
    )
    click.echo(f"bare encode:   {text_bytes / bare_s / 1e6:6.2f} MB per CPU-second")
    click.echo(f"text to shard: {text_bytes / ours_s / 1e6:6.2f} MB per CPU-second")
    click.echo(f"ratio          {bare_s / ours_s:6.2f}")


if __name__ == "__main__":
    main()
