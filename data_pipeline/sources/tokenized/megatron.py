"""Documents of Megatron-LM's `.bin` and `.idx` (MMIDIDX, version 1).

The index, after its header: the length (i32) and the first byte (i64) of each sequence, then the
sequences (i64) at which documents begin, the last one being their number. It is read in parts.
"""

import itertools
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.documents import Slice, require_stamp
from data_pipeline.sources.tokenized.documents import (
    RawDocument,
    RawItem,
    TokenizedFormat,
    too_long,
)
from data_pipeline.sources.tokenized.id_files import IdFile, damaged, stamp_of_file

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 6: "<f8", 7: "<f4", 8: "<u2"}
SLICE_DOCUMENTS = 1 << 14


class MegatronIndex:
    """The index of a pair of files, checked against their sizes."""

    def __init__(self, index_path: Path) -> None:
        """Raises OSError, SourceUnreadableError."""
        self.path = index_path
        self.bin_path = index_path.with_suffix(".bin")
        self.bin_bytes = self.bin_path.stat().st_size
        index_bytes = index_path.stat().st_size
        with index_path.open("rb") as file:
            head = file.read(_HEADER.size)
        if len(head) < _HEADER.size or not head.startswith(_MAGIC):
            raise damaged(
                index_path, "it does not begin with MMIDIDX, as an index of Megatron does"
            )
        _, version, code, num_sequences, num_indices = _HEADER.unpack(head)
        if version != 1 or code not in _DTYPES:
            raise SourceUnreadableError(
                f"{index_path}: version {version} and type {code} of ids; versions 1 and types "
                f"{', '.join(map(str, _DTYPES))} are known"
            )
        self.dtype = np.dtype(_DTYPES[code])
        if self.dtype.kind == "f":
            raise SourceUnreadableError(
                f"{index_path}: it holds {self.dtype.name}, not ids; give a file of whole numbers"
            )
        expected_bytes = _HEADER.size + 12 * num_sequences + 8 * num_indices
        if index_bytes == expected_bytes + num_sequences and num_sequences:
            raise SourceUnreadableError(
                f"{index_path}: it has a mode per sequence, of several kinds of data, which "
                "documents do not have; write one without modes"
            )
        if index_bytes != expected_bytes:
            raise damaged(
                index_path,
                f"its {num_sequences:,} sequences and {num_indices:,} documents take "
                f"{expected_bytes:,} bytes, and it has {index_bytes:,}",
            )
        at = _HEADER.size
        self._lengths = IdFile(index_path, np.dtype("<i4"), at, num_sequences)
        at += 4 * num_sequences
        self._pointers = IdFile(index_path, np.dtype("<i8"), at, num_sequences)
        at += 8 * num_sequences
        self._documents = IdFile(index_path, np.dtype("<i8"), at, num_indices)
        self.num_documents = max(num_indices - 1, 0)
        self._num_sequences = num_sequences

    def stamp(self) -> str:
        return f"{stamp_of_file(self.path)}:{stamp_of_file(self.bin_path)}"

    def bounds(self, start: int, stop: int) -> tuple[list[int], list[int], list[int]]:
        """First sequences of documents `start` to `stop` and of the next one; first bytes and
        lengths in tokens of those sequences. Raises SourceUnreadableError."""
        with self._documents as file:
            firsts = file.read(start, stop + 1)
        if (
            (np.diff(firsts) < 0).any()
            or firsts[0] < 0
            or firsts[-1] > self._num_sequences
            or (start == 0 and firsts[0] != 0)
            or (stop == self.num_documents and firsts[-1] != self._num_sequences)
        ):
            raise damaged(self.path, f"its documents {start:,} to {stop:,} are not in order")
        sequences = int(firsts[0]), int(firsts[-1])
        with self._pointers as file:
            pointers = file.read(*sequences)
        with self._lengths as file:
            lengths = file.read(*sequences).astype(np.int64)
        ends = pointers + lengths * self.dtype.itemsize
        if len(ends) and (
            lengths.min() < 0
            or pointers.min() < 0
            or lengths.max() > self.bin_bytes
            or int(ends.max()) > self.bin_bytes
        ):
            raise damaged(
                self.bin_path,
                f"its {self.bin_bytes:,} bytes end before the sequences {sequences[0]:,} to "
                f"{sequences[1]:,} of {self.path.name}",
            )
        last_sequence = self._num_sequences
        if sequences[1] == last_sequence and len(ends) and int(ends.max()) != self.bin_bytes:
            raise damaged(
                self.bin_path,
                f"it has {self.bin_bytes:,} bytes, and the sequences of {self.path.name} end at "
                f"byte {int(ends.max()):,}",
            )
        return (firsts - firsts[0]).tolist(), pointers.tolist(), lengths.tolist()


def list_megatron(index_path: Path) -> list[Slice]:
    """Slices of SLICE_DOCUMENTS documents. Raises OSError, SourceUnreadableError."""
    index = MegatronIndex(index_path)
    stamp = index.stamp()
    slices = []
    for start in range(0, index.num_documents, SLICE_DOCUMENTS):
        stop = min(start + SLICE_DOCUMENTS, index.num_documents)
        _, _, lengths = index.bounds(start, stop)
        slices.append(
            Slice(
                kind="megatron",
                path=str(index_path),
                start=start,
                stop=stop,
                size_bytes=sum(lengths) * index.dtype.itemsize,
                stamp=stamp,
            )
        )
    return slices


def read_megatron(piece: Slice, form: TokenizedFormat, max_record_bytes: int) -> Iterator[RawItem]:
    """The documents of a slice, their sequences joined. Raises OSError, SourceUnreadableError."""
    index = MegatronIndex(Path(piece.path))
    require_stamp(piece, index.stamp())
    firsts, pointers, lengths = index.bounds(piece.start, piece.stop)
    size = index.dtype.itemsize
    with IdFile(index.bin_path, np.dtype("u1"), 0, index.bin_bytes) as file:
        for number, (first, stop) in enumerate(itertools.pairwise(firsts)):
            place = f"{index.bin_path}: document {piece.start + number:,}"
            if sum(lengths[first:stop]) > max_record_bytes:
                yield too_long(place, max_record_bytes, form)
                continue
            parts = [
                file.read(pointers[each], pointers[each] + lengths[each] * size).view(index.dtype)
                for each in range(first, stop)
            ]
            yield RawDocument(np.concatenate(parts) if parts else np.empty(0, index.dtype), place)
