"""Task output: the shards of each split, and notes of staged documents."""

import struct
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.build.plan import Task
from data_pipeline.build.settings import BuildSettings
from data_pipeline.build.task_input import Passed
from data_pipeline.common.atomic import replacing
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.examples import PackedExample
from data_pipeline.shards.manifest import ShardEntry
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.codec import TextCodec
from data_pipeline.text.encoder import Ids

# Note of a staged document. `high` and `low` are the first 16 bytes of the SHA-256 of its text,
# combined with the pass that read it; they identify it.
DOCUMENT_NOTE = np.dtype(
    [("split", "u1"), ("tokens", "<u4"), ("text_bytes", "<u4"), ("high", "<u8"), ("low", "<u8")]
)
_NOTE = struct.Struct("<BIIQQ")
_OPEN_ROWS = 32


@dataclass(frozen=True)
class EncodedDocument:
    ids: Ids
    text_bytes: int


Encoded = EncodedDocument | PackedExample


class Notes:
    """Notes of a task's documents, and whether it has as many as the limits can require."""

    def __init__(self, settings: BuildSettings) -> None:
        self.packed = bytearray()
        self._limit_documents = settings.limit_documents
        self._limit_tokens = settings.limit_tokens
        self._is_limited = settings.is_limited
        self._seen: set[int] | None = set() if settings.deduplicate else None
        self._documents = self._tokens = 0

    def add(self, split: int, tokens: int, document: Passed) -> bool:
        """Note a document. True when no later document of this task can be within the limits.

        This holds with de-duplication too: each distinct text before a later one counts toward the
        limit, in this task or in an earlier one.
        """
        high = int.from_bytes(document.sha256[:8], "big") ^ document.pass_number
        low = int.from_bytes(document.sha256[8:16], "big")
        self.packed += _NOTE.pack(split, tokens, document.num_bytes, high, low)
        if not self._is_limited:
            return False
        if self._seen is not None:
            if high in self._seen:
                return False
            self._seen.add(high)
        self._documents += 1
        self._tokens += tokens
        return (self._limit_documents is not None and self._documents >= self._limit_documents) or (
            self._limit_tokens is not None and self._tokens >= self._limit_tokens
        )


class RowPacker:
    """Packs examples into rows by best fit: each into the fullest open row with room for it.

    Examples are returned row by row, in an order that depends only on the examples and their order.
    """

    def __init__(self, row_tokens: int, padding_id: int) -> None:
        self._row_tokens = row_tokens
        self._padding_id = padding_id
        self._open: list[list[PackedExample]] = []
        self._room: list[int] = []

    def add(self, example: PackedExample) -> Iterator[PackedExample]:
        """Add an example of at most `row_tokens` ids. Yields the examples of rows it closes."""
        size = len(example.ids)
        if size > self._row_tokens:
            raise ValueError(f"an example of {size} tokens does not fit a row")
        fitting = [number for number, room in enumerate(self._room) if room >= size]
        if fitting:
            row = min(fitting, key=self._room.__getitem__)
        else:
            if len(self._open) == _OPEN_ROWS:
                yield from self._close(self._room.index(min(self._room)))
            row = len(self._open)
            self._open.append([])
            self._room.append(self._row_tokens)
        self._open[row].append(example)
        self._room[row] -= size
        if not self._room[row]:
            yield from self._close(row)

    def finish(self) -> Iterator[PackedExample]:
        """Yield the examples of the rows that are still open."""
        while self._open:
            yield from self._close(0)

    def _close(self, row: int) -> Iterator[PackedExample]:
        *first, last = self._open.pop(row)
        yield from first
        padding = np.full(self._room.pop(row), self._padding_id, dtype=last.ids.dtype)
        ids = np.concatenate([last.ids, padding])
        yield PackedExample(ids, last.num_given, last.num_loss_tokens, last.text_bytes)


class SplitOutput:
    """Writes the shards of one task and split, opened as documents arrive."""

    def __init__(
        self, split: str, task: Task, folder: Path, codec: TextCodec, shards: list[ShardEntry]
    ) -> None:
        self._split = split
        self._task = task
        self._folder = folder
        self._codec = codec
        self._shards = shards
        self._num_shards = 0
        self._open_file = ExitStack()
        self._writer: ShardWriter | None = None
        row_tokens = task.settings.row_tokens
        self._packer = None if row_tokens is None else RowPacker(row_tokens, codec.end_id)

    def __enter__(self) -> "SplitOutput":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._close_shard()
        else:
            self._open_file.__exit__(*error)

    def add(self, encoded: Encoded) -> None:
        if isinstance(encoded, EncodedDocument):
            self._open().add(encoded.ids, encoded.text_bytes)
            self._close_if_full()
        elif self._packer is not None:
            self._add_rows(self._packer.add(encoded))

    def finish(self) -> None:
        """Write the rows that are still open."""
        if self._packer is not None:
            self._add_rows(self._packer.finish())

    def _add_rows(self, examples: Iterator[PackedExample]) -> None:
        for example in examples:
            writer = self._open()
            writer.add_example(example)
            if writer.tokens % (self._task.settings.row_tokens or 1) == 0:
                self._close_if_full()

    def _open(self) -> ShardWriter:
        settings = self._task.settings
        if self._writer is None:
            file = self._open_file.enter_context(replacing(self._folder / self._file_name()))
            self._writer = ShardWriter(
                file,
                self._codec.format.to_dict(),
                self._codec.id_dtype,
                settings.frame_tokens,
                Compression(level=settings.compression_level),
                settings.row_tokens,
            )
        return self._writer

    def _close_if_full(self) -> None:
        if self._writer is not None and (
            self._writer.tokens >= self._task.settings.shard_tokens or self._writer.is_full
        ):
            self._close_shard()

    def _file_name(self) -> str:
        return f"{self._split}-{self._task.index:05d}-{self._num_shards:05d}.zst"

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        with self._open_file:  # the file takes its final name when this block ends
            digest = self._writer.finish()
        self._shards.append(ShardEntry(self._file_name(), self._split, **asdict(digest)))
        self._num_shards += 1
        self._writer = None
