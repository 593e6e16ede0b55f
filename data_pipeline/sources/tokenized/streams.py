"""Streams of ids with an id between documents: nanoGPT's .bin, llm.c's, and numpy's arrays.

The files of a source are one stream, in the order of their names: llm.c cuts documents at the ends
of its files.
"""

import hashlib
import json
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

from data_pipeline.errors import SourceMissingError
from data_pipeline.sources.documents import Slice, require_stamp
from data_pipeline.sources.tokenized.documents import (
    AnyIds,
    RawDocument,
    RawItem,
    TokenizedFormat,
    cut,
    too_long,
)
from data_pipeline.sources.tokenized.id_files import IdFile, open_ids, stamp_of_file

SLICE_BYTES = 16 << 20
_CHUNK_TOKENS = 1 << 20
_SUFFIXES = (".bin", ".npy", ".ds")


class Stream:
    """The ids of several files, one after another."""

    def __init__(self, files: Sequence[IdFile]) -> None:
        self._files = files
        self._stops = list(accumulate(file.num_tokens for file in files))
        self.num_tokens = self._stops[-1]

    def read(self, start: int, stop: int) -> AnyIds:
        """Ids from `start` on, of one file: shape (1 to stop - start,)."""
        number = bisect_right(self._stops, start)
        first = self._stops[number] - self._files[number].num_tokens
        with self._files[number] as file:
            return file.read(start - first, min(stop, self._stops[number]) - first)

    def chunks(self, start: int) -> Iterator[AnyIds]:
        while start < self.num_tokens:
            chunk = self.read(start, start + _CHUNK_TOKENS)
            yield chunk
            start += len(chunk)

    def place(self, token: int) -> str:
        """File and token, for messages."""
        number = bisect_right(self._stops, token)
        file = self._files[number]
        within = token - self._stops[number] + file.num_tokens
        at_byte = file.offset + within * file.dtype.itemsize
        return f"{file.path}: document at token {within:,} (byte {at_byte:,})"


def stream_files(source: Path) -> list[Path]:
    """The files of a stream, by name: a file, those in a folder, or those of a pattern.

    Raises SourceMissingError.
    """
    if source.is_dir():
        found = list(source.iterdir())
    else:
        found = [source] if source.exists() else list(source.parent.glob(source.name))
    if found != [source]:
        found = [path for path in found if path.suffix in _SUFFIXES]
    if not found:
        raise SourceMissingError(
            f"{source}: no such file, and no file matches it as a pattern; give a file, a folder "
            "or a quoted pattern of .bin, .npy, .bin with .idx, .ds, or MDS"
        )
    return sorted(found)


def list_stream(source: Path, form: TokenizedFormat) -> list[Slice]:
    """Slices of about SLICE_BYTES; a document is in that of its first token. Raises OSError,
    SourceMissingError, SourceUnreadableError."""
    files = _open(source, form)
    size_bytes = files[0].dtype.itemsize
    stream = Stream(files)
    step = SLICE_BYTES // size_bytes
    stamp = _stamp(files)
    return [
        Slice(
            kind="ids",
            path=str(source),
            start=start,
            stop=min(start + step, stream.num_tokens),
            size_bytes=(min(start + step, stream.num_tokens) - start) * size_bytes,
            stamp=stamp,
        )
        for start in range(0, stream.num_tokens, step)
    ]


def read_stream(piece: Slice, form: TokenizedFormat, max_record_bytes: int) -> Iterator[RawItem]:
    """The documents that begin in a slice. Raises OSError, SourceUnreadableError."""
    files = _open(Path(piece.path), form)
    require_stamp(piece, _stamp(files))
    stream = Stream(files)
    begins_within = piece.start > 0 and stream.read(piece.start - 1, piece.start)[0] != form.end_id
    documents = cut(
        stream.chunks(piece.start),
        form.end_id,
        lambda: piece.stop,
        max_record_bytes,
        position=piece.start,
        skips_first=begins_within,
    )
    for start, ids in documents:
        place = stream.place(min(start, stream.num_tokens - 1))
        if ids is None:
            yield too_long(place, max_record_bytes, form)
        else:
            yield RawDocument(ids, place)


def _open(source: Path, form: TokenizedFormat) -> list[IdFile]:
    return [open_ids(path, form) for path in stream_files(source)]


def _stamp(files: Sequence[IdFile]) -> str:
    """Stamp of all files of a stream: a document may continue in the next one."""
    stamps = [[file.path.name, stamp_of_file(file.path), file.dtype.str] for file in files]
    return hashlib.sha256(json.dumps(stamps).encode()).hexdigest()
