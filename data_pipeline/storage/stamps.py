"""Stamps: cheap digests for detecting changed files."""

import hashlib
import os
from pathlib import Path

from data_pipeline.common.regular_files import open_file

STAMPED_BYTES = 64 << 10


def file_stamp(path: Path) -> str:
    """Digest of a regular file's size and of its first and last 64 KiB. Raises OSError."""
    with os.fdopen(open_file(path), "rb") as file:
        head = file.read(STAMPED_BYTES)
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, size_bytes - STAMPED_BYTES))
        tail = file.read(STAMPED_BYTES)
    return stamp_of(size_bytes, head, tail)


def stamp_of(size_bytes: int, head: bytes, tail: bytes) -> str:
    """Digest of a file's size and of its first and last 64 KiB."""
    return hashlib.sha256(b"%d:" % size_bytes + head + tail).hexdigest()
