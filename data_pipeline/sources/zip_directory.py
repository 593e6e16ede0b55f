"""Validation of zip archives against zip bombs.

The size of the directory is checked before it is loaded; before decompression, the total expanded
size, and that no files overlap.
"""

import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import BinaryIO

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.decompression import corrupt, expands_like_text

ZIP_ERRORS = (
    *(zipfile.BadZipFile, zipfile.LargeZipFile, NotImplementedError, RuntimeError),
    *(EOFError, ValueError, OverflowError, struct.error, zlib.error),
)
"""Errors of `zipfile` for invalid archives."""
METHODS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""Supported compression methods; for others `zipfile` has no bounded reads."""

_MAX_DIRECTORY_BYTES = 32 << 20
"""Maximum size of a directory, for a few hundred thousand files; Python's list of them takes ten
times as much."""
_DIRECTORY_SIZE, _DIRECTORY_OFFSET, _END_OFFSET = 5, 6, 9
"""Indexes in the result of `zipfile._EndRecData`."""
_LOCAL_HEADER_BYTES = 30


@contextmanager
def open_zip(stream: BinaryIO, shown: str) -> Iterator[zipfile.ZipFile]:
    """Open an archive; `shown`: address for messages. Raises OSError, SourceUnreadableError."""
    try:
        _require_small_directory(stream, shown)
        archive = zipfile.ZipFile(stream)
    except ZIP_ERRORS as error:
        raise corrupt(shown, error) from None
    with archive:
        _require_possible(archive, stream.seek(0, 2), shown)
        yield archive


def _require_small_directory(stream: BinaryIO, shown: str) -> None:
    end = zipfile._EndRecData(stream)  # type: ignore[attr-defined]
    if end is None:
        raise zipfile.BadZipFile("File is not a zip file")
    size_bytes = end[_DIRECTORY_SIZE]
    if size_bytes + end[_DIRECTORY_OFFSET] > end[_END_OFFSET]:
        raise zipfile.BadZipFile("its directory is longer than the file")
    if size_bytes > _MAX_DIRECTORY_BYTES:
        raise SourceUnreadableError(
            f"{shown}: its directory has {size_bytes:,} bytes, more than the maximum of "
            f"{_MAX_DIRECTORY_BYTES:,}; unpack it and name the folder"
        )


def _require_possible(archive: zipfile.ZipFile, archive_bytes: int, shown: str) -> None:
    infos = archive.infolist()
    expanded_bytes = sum(info.file_size for info in infos)
    if not expands_like_text(expanded_bytes, archive_bytes):
        raise SourceUnreadableError(
            f"{shown}: its files claim to expand to {expanded_bytes:,} bytes, more than 1,000 "
            "times its size, unlike text; if you trust it, unpack it and name the folder"
        )
    starts = sorted((info.header_offset, info.compress_size) for info in infos)
    for (start, size_bytes), (next_start, _) in pairwise([*starts, (archive.start_dir, 0)]):
        if start + _LOCAL_HEADER_BYTES + size_bytes > next_start:
            raise SourceUnreadableError(
                f"{shown}: its files overlap, as in a zip bomb; get it from another place or, if "
                "you trust it, unpack it and name the folder"
            )
