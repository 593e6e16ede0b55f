"""Files of token ids as other programs write them: flat, with llm.c's header, or numpy's.

Read by position and in pieces rather than mapped, so that a file that is truncated meanwhile is an
error instead of a signal. No pickle is read.
"""

import os
import re
import struct
from functools import lru_cache
from pathlib import Path
from types import TracebackType

import numpy as np

from data_pipeline.common.regular_files import open_file
from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.tokenized.documents import AnyIds, TokenizedFormat
from data_pipeline.storage.stamps import file_stamp

_LLMC_MAGIC = 20240520
_LLMC_HEADER_BYTES = 1024
_LLMC_TYPES = {1: "<u2", 7: "<u4"}
"""Types of ids by llm.c's version: GPT-2's and Llama 3's."""
_NPY_MAGIC = b"\x93NUMPY"
_NPY_HEADER = re.compile(
    rb"\{'descr': '([<>|][iu][1248])', 'fortran_order': False, 'shape': \(([0-9]{1,18}),\), \}\s*"
)
_HEAD_BYTES = 128 << 10


class IdFile:
    """Ids of one type in a part of a file: `num_tokens` of them from byte `offset` on."""

    def __init__(self, path: Path, dtype: np.dtype[np.integer], offset: int, num_tokens: int):
        self.path = path
        self.dtype = dtype
        self.offset = offset
        self.num_tokens = num_tokens
        self._descriptor: int | None = None

    def __enter__(self) -> "IdFile":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def read(self, start: int, stop: int) -> AnyIds:
        """Ids from `start` to `stop`: shape (stop - start,). Raises OSError, and
        SourceUnreadableError when the file ends before."""
        if self._descriptor is None:
            self._descriptor = open_file(self.path)
        size = self.dtype.itemsize
        data = bytearray()
        while len(data) < (stop - start) * size:
            at = self.offset + start * size + len(data)
            piece = os.pread(self._descriptor, (stop - start) * size - len(data), at)
            if not piece:
                raise damaged(self.path, f"it ends at byte {at:,}, before token {stop:,}")
            data += piece
        return np.frombuffer(data, self.dtype)


def damaged(path: Path | str, problem: str) -> SourceUnreadableError:
    """The error for a file that contradicts its own format."""
    return SourceUnreadableError(f"{path}: {problem}; fetch or write it again")


def open_ids(path: Path, form: TokenizedFormat) -> IdFile:
    """The ids of a flat file, of llm.c's, or of a numpy array.

    Raises OSError, and SourceUnreadableError for one that is truncated or of another type.
    """
    with os.fdopen(open_file(path), "rb") as file:
        head = file.read(_HEAD_BYTES)
        size_bytes = os.fstat(file.fileno()).st_size
    if head.startswith(_NPY_MAGIC):
        return _numpy_file(path, head, size_bytes)
    if size_bytes >= _LLMC_HEADER_BYTES:
        magic, version, num_tokens = struct.unpack_from("<iii", head)
        if magic == _LLMC_MAGIC and version in _LLMC_TYPES:
            dtype = np.dtype(_LLMC_TYPES[version])
            file_bytes = _LLMC_HEADER_BYTES + num_tokens * dtype.itemsize
            if num_tokens < 0 or size_bytes != file_bytes:
                raise damaged(
                    path,
                    f"its header has {num_tokens:,} tokens, {file_bytes:,} bytes, and it has "
                    f"{size_bytes:,} bytes",
                )
            return IdFile(path, dtype, _LLMC_HEADER_BYTES, num_tokens)
    return flat_file(path, np.dtype(form.flat_type), head, size_bytes)


def flat_file(path: Path, dtype: np.dtype[np.integer], head: bytes, size_bytes: int) -> IdFile:
    """The ids of a file of nothing else, of which `head` is the beginning."""
    dtype = dtype.newbyteorder("<")
    num_tokens, rest_bytes = divmod(size_bytes, dtype.itemsize)
    if rest_bytes:
        raise damaged(
            path,
            f"its {size_bytes:,} bytes are no whole number of {dtype.name} ids: it is cut within "
            "the last one, or of another type, which `id_type` gives",
        )
    first = np.frombuffer(head[: len(head) & ~3], "<u2")
    if dtype.itemsize == 2 and len(first) >= 4 and not first[1::2].any() and first.any():
        raise SourceUnreadableError(
            f"{path}: as {dtype.name}, every second id is 0, so that it seems to hold uint32; give "
            "`id_type` uint32"
        )
    return IdFile(path, dtype, 0, num_tokens)


def _numpy_file(path: Path, head: bytes, size_bytes: int) -> IdFile:
    """The ids of an array. Its header is matched: numpy would evaluate it, and unpickle objects."""
    is_short = head[len(_NPY_MAGIC) : len(_NPY_MAGIC) + 1] == b"\1"
    at = len(_NPY_MAGIC) + (4 if is_short else 6)
    header_bytes = int.from_bytes(head[len(_NPY_MAGIC) + 2 : at], "little")
    header = head[at : at + header_bytes]
    found = _NPY_HEADER.fullmatch(header)
    if found is None:
        raise SourceUnreadableError(
            f"{path}: its header {header[:80]!r} is not that of a sequence of ids, an array of "
            "whole numbers in one dimension; write the ids of its documents one after another"
        )
    dtype, num_ids = np.dtype(found[1].decode()), int(found[2])
    offset = at + header_bytes
    if size_bytes != offset + num_ids * dtype.itemsize:
        raise damaged(path, f"its header has {num_ids:,} ids, and its size is {size_bytes:,} bytes")
    return IdFile(path, dtype, offset, num_ids)


def stamp_of_file(path: Path) -> str:
    """Stamp of a file, once for each of its states in a process. Raises OSError."""
    status = path.stat()
    return _stamp(path, status.st_size, status.st_mtime_ns)


@lru_cache(maxsize=4096)
def _stamp(path: Path, size_bytes: int, mtime_ns: int) -> str:  # noqa: ARG001 - the state
    return file_stamp(path)
