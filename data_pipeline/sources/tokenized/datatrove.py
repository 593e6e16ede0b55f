"""Documents of datatrove's `.ds`: ids, with the ends of documents (u64, in tokens) in `.ds.index`.

A mask in `.ds.loss` has a byte per id. A file without an index is a stream.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from itertools import pairwise
from pathlib import Path

import numpy as np

from data_pipeline.sources.documents import Slice, require_stamp
from data_pipeline.sources.tokenized.documents import (
    RawDocument,
    RawItem,
    TokenizedFormat,
    too_long,
)
from data_pipeline.sources.tokenized.id_files import IdFile, damaged, stamp_of_file

SLICE_DOCUMENTS = 1 << 14


def index_of(path: Path) -> Path:
    """The index of a `.ds` file; there may be none."""
    return path.with_name(f"{path.name}.index")


class DatatroveFile:
    """A `.ds` file with its index, checked against their sizes."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, SourceUnreadableError."""
        self._index_path = index_of(path)
        size_bytes = path.stat().st_size
        self.num_documents, rest_bytes = divmod(self._index_path.stat().st_size, 8)
        if rest_bytes:
            raise damaged(self._index_path, "it is cut within a number")
        self._ends = IdFile(self._index_path, np.dtype("<u8"), 0, self.num_documents)
        num_tokens = self.starts(self.num_documents, self.num_documents)[0]
        if size_bytes not in (2 * num_tokens, 4 * num_tokens):
            raise damaged(
                path,
                f"its {size_bytes:,} bytes are not the {num_tokens:,} ids of "
                f"{self._index_path.name}, of two or four bytes each",
            )
        dtype = np.dtype("<u4" if num_tokens and size_bytes == 4 * num_tokens else "<u2")
        self.ids = IdFile(path, dtype, 0, num_tokens)
        self.loss: IdFile | None = None
        loss_path = path.with_name(f"{path.name}.loss")
        if loss_path.exists():
            if loss_path.stat().st_size != num_tokens:
                raise damaged(loss_path, f"it is no mask of {num_tokens:,} ids")
            self.loss = IdFile(loss_path, np.dtype("u1"), 0, num_tokens)

    def stamp(self) -> str:
        paths = [self.ids.path, self._index_path]
        if self.loss is not None:
            paths.append(self.loss.path)
        return ":".join(map(stamp_of_file, paths))

    def starts(self, start: int, stop: int) -> list[int]:
        """First tokens of documents `start` to `stop`, and of the next one.

        Raises SourceUnreadableError.
        """
        with self._ends as file:
            ends = file.read(max(start - 1, 0), stop).tolist()
        starts = ends if start else [0, *ends]
        if any(first > second for first, second in pairwise(starts)):
            raise damaged(self._index_path, f"documents {start:,} to {stop:,} are not in order")
        return starts


def list_datatrove(path: Path) -> list[Slice]:
    """Slices of SLICE_DOCUMENTS documents. Raises OSError, SourceUnreadableError."""
    file = DatatroveFile(path)
    stamp = file.stamp()
    slices = []
    for start in range(0, file.num_documents, SLICE_DOCUMENTS):
        stop = min(start + SLICE_DOCUMENTS, file.num_documents)
        starts = file.starts(start, stop)
        size_bytes = (starts[-1] - starts[0]) * file.ids.dtype.itemsize
        slices.append(
            Slice(
                kind="datatrove",
                path=str(path),
                start=start,
                stop=stop,
                size_bytes=size_bytes,
                stamp=stamp,
            )
        )
    return slices


def read_datatrove(piece: Slice, form: TokenizedFormat, max_record_bytes: int) -> Iterator[RawItem]:
    """The documents of a slice. Raises OSError, SourceUnreadableError."""
    file = DatatroveFile(Path(piece.path))
    require_stamp(piece, file.stamp())
    bounds = pairwise(file.starts(piece.start, piece.stop))
    with file.ids as ids, file.loss or nullcontext() as loss:
        for number, (start, stop) in enumerate(bounds, piece.start):
            place = f"{piece.path}: document {number:,}"
            if stop - start > max_record_bytes:
                yield too_long(place, max_record_bytes, form)
            else:
                mask = None if loss is None else loss.read(start, stop)
                yield RawDocument(ids.read(start, stop), place, mask)
