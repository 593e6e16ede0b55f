"""zstd on frames of ids: size and speed by level, dictionary and long-distance matching.

    python benchmarks/compression.py TOKENIZER SOURCE

Dictionaries are trained on the first half of the frames; everything is measured on the second. CPU
time of one core: every variant is run once per round, and the median over rounds is printed. The
last rows are for information only: shards contain no such frames.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

import click
import numpy as np
import zstandard
from smoke import Benchmark

from data_pipeline.shards.compression import Compression
from data_pipeline.shards.recompress import train_dictionary
from data_pipeline.shards.writer import DEFAULT_FRAME_TOKENS
from data_pipeline.sources.registry import list_slices, read_slice
from data_pipeline.text.codec import Direction, TextCodec, Unit

_LEVELS = (1, 3, 6, 9, 12, 19)
_DICTIONARY_LEVELS = (3, 9, 19)
_DICTIONARY_KIB = (16, 64, 110, 1024)
_Transform = Callable[[bytes], bytes]


@dataclass
class Variant:
    """One way to compress frames, and its measurements."""

    name: str
    compression: Compression
    before: _Transform | None = None
    after: _Transform | None = None
    ratio: float = 0.0
    compress_s: list[float] = field(default_factory=list)
    decompress_s: list[float] = field(default_factory=list)

    def measure(self, frames: list[bytes]) -> None:
        """Compress and decompress every frame once."""
        compressor = self.compression.compressor()
        decompressor = zstandard.ZstdDecompressor(dict_data=self.compression.zstd_dictionary())
        # A dictionary is digested at its first use, once per shard.
        decompressor.decompress(compressor.compress(frames[0]))

        started = time.process_time()
        compressed = [
            compressor.compress(self.before(frame) if self.before else frame) for frame in frames
        ]
        self.compress_s.append(time.process_time() - started)

        started = time.process_time()
        for data in compressed:
            raw = decompressor.decompress(data)
            if self.after:
                self.after(raw)
        self.decompress_s.append(time.process_time() - started)
        self.ratio = sum(map(len, compressed)) / sum(map(len, frames))

    def row(self, raw_bytes: int) -> str:
        compress_s = statistics.median(self.compress_s)
        decompress_s = statistics.median(self.decompress_s)
        return (
            f"{self.name:<24} {self.compression.level:>5} {self.ratio:>7.4f} "
            f"{raw_bytes / compress_s / 1e6:>9.1f} {raw_bytes / decompress_s / 1e6:>11.0f}"
        )


def split_planes(raw: bytes) -> bytes:
    """All low bytes of uint16 ids, then all high bytes."""
    return np.frombuffer(raw, dtype=np.uint8).reshape(-1, 2).T.tobytes()


def join_planes(planes: bytes) -> bytes:
    return np.frombuffer(planes, dtype=np.uint8).reshape(2, -1).T.tobytes()


def variants(sample: list[bytes], dictionary_kib: tuple[int, ...]) -> list[Variant]:
    """All variants, in the order of the table."""
    plain = [Variant("plain", Compression(level)) for level in _LEVELS]
    distant = [
        Variant("long-distance", Compression(level, long_distance=True)) for level in _LEVELS
    ]
    with_dictionary = []
    for kib in dictionary_kib:
        dictionary = train_dictionary(sample, kib << 10)
        with_dictionary += [
            Variant(f"dictionary of {kib} KiB", Compression(level, dictionary=dictionary))
            for level in _DICTIONARY_LEVELS
        ]
    planes = [
        Variant(
            name="byte planes",
            compression=Compression(level),
            before=split_planes,
            after=join_planes,
        )
        for level in _DICTIONARY_LEVELS
    ]
    return [*plain, *distant, *with_dictionary, *planes]


@click.command(
    cls=Benchmark,
    smoke="{tokenizer} {text} --frame-tokens 1024 --dictionary-kib 1 --frames 4 --rounds 1",
)
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("source")
@click.option(
    "--frames", "max_frames", default=40, show_default=True, help="Maximum frames to measure."
)
@click.option("--rounds", default=5, show_default=True, help="Rounds; medians are printed.")
@click.option(
    "--frame-tokens", default=DEFAULT_FRAME_TOKENS, show_default=True, help="Tokens per frame."
)
@click.option(
    "--dictionary-kib",
    multiple=True,
    type=int,
    default=_DICTIONARY_KIB,
    help="Dictionary size in KiB; repeatable.",
)
def main(
    tokenizer: Path,
    source: str,
    max_frames: int,
    rounds: int,
    frame_tokens: int,
    dictionary_kib: tuple[int, ...],
) -> None:
    """Print the compressed part of the raw size, and MB of raw ids per CPU second."""
    codec = TextCodec.load(tokenizer, Direction.BACKWARD, Unit.TOKEN)
    every = (document.text for piece in list_slices(source) for document in read_slice(piece))
    ids = np.concatenate([codec.encode_document(text) for text in islice(every, 100_000)])
    starts = range(0, len(ids) - frame_tokens + 1, frame_tokens)
    frames = [ids[start : start + frame_tokens].tobytes() for start in starts]
    half = len(frames) // 2
    # The frame in between may share a document with the sample.
    sample, measured = frames[:half], frames[half + 1 :][:max_frames]

    compared = variants(sample, dictionary_kib)
    for _ in range(rounds):
        for variant in compared:
            variant.measure(measured)

    raw_bytes = sum(map(len, measured))
    zstd_version = ".".join(map(str, zstandard.ZSTD_VERSION))
    click.echo(
        f"zstd {zstd_version}, {codec.vocab_size:,} pieces, {len(measured)} frames of "
        f"{frame_tokens:,} ids ({raw_bytes / 1e6:.1f} MB), dictionaries from "
        f"{len(sample)} others, median of {rounds}"
    )
    click.echo(f"{'':<24} level   ratio  compress  decompress   (MB of ids per CPU second)")
    for variant in compared:
        click.echo(variant.row(raw_bytes))


if __name__ == "__main__":
    main()
