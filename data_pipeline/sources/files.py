"""Uniform access to local and remote files of a source.

The address of a file is an absolute local path or a URL.
"""

import os
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol

from data_pipeline.common.regular_files import open_file
from data_pipeline.redaction import is_url, shown_url
from data_pipeline.sources.decompression import COMPRESSIONS
from data_pipeline.storage import remote_file
from data_pipeline.storage.stamps import file_stamp
from data_pipeline.storage.urls import url_path

_KINDS = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".jsonlines", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".txt", ".text", ".md", ".markdown", ".rst"), "text"),
    **dict.fromkeys((".html", ".htm", ".xhtml"), "html"),
    ".zip": "zip",
}
FILE_KINDS = frozenset({*_KINDS.values(), "lines"})
_WHOLE = ("parquet", "zip")
"""Kinds that have their own compression."""
SUFFIXES = (
    f"{', '.join(_KINDS)} (all but .parquet and .zip also with {', '.join(COMPRESSIONS)}; "
    "HTML with `html`)"
)
"""Supported suffixes, for messages."""
_PARQUET_BUFFER_BYTES = 1 << 20


class DataFile(Protocol):
    """A file of a source, with its size and stamp."""

    shown: str
    """Address of the file, for messages."""
    size_bytes: int
    stamp: str

    def stream(self) -> BinaryIO:
        """Sequential reader of the bytes. Raises OSError, SourceUnreadableError."""

    def parquet(self) -> tuple[Any, int]:
        """Argument of pyarrow's ParquetFile, and its buffer size in bytes."""


class LocalFile:
    """A local file."""

    def __init__(self, path: Path) -> None:
        """Raises OSError, also unless it is a regular file."""
        self.shown = str(path)
        self.size_bytes = path.stat().st_size
        self.stamp = file_stamp(path)
        self._path = path

    def stream(self) -> BinaryIO:
        return os.fdopen(open_file(self._path), "rb")

    def parquet(self) -> tuple[Any, int]:
        return self._path, _PARQUET_BUFFER_BYTES


class UrlFile:
    """A file behind a URL."""

    def __init__(self, url: str) -> None:
        """Raises FileNotFoundError, SourceUnreadableError, BackendError."""
        self._file = remote_file.RemoteFile(url)
        self.shown = shown_url(url)
        self.size_bytes = self._file.size_bytes
        self.stamp = self._file.stamp()

    def stream(self) -> BinaryIO:
        return self._file.buffered()

    def parquet(self) -> tuple[Any, int]:
        # Unbuffered: columns are read in turn, and one buffer for all would be refilled each time.
        return self._file, remote_file.BLOCK_BYTES


def stat_address(address: str) -> DataFile:
    """File at an address. Raises OSError, SourceUnreadableError, BackendError."""
    return UrlFile(address) if is_url(address) else LocalFile(Path(address))


def name_of(address: str) -> PurePath:
    """The last component of an address."""
    path = url_path(address) if is_url(address) else PurePath(address)
    return PurePath(path.name)


def kind_of(address: str) -> str | None:
    """`parquet`, `jsonl`, `text`, `html` or `zip`, from the suffix; None if unsupported."""
    name = name_of(address)
    suffix = name.suffix.lower()
    if suffix in COMPRESSIONS:
        kind = _KINDS.get(PurePath(name.stem).suffix.lower())
        return None if kind in _WHOLE else kind
    return _KINDS.get(suffix)


def suffix_of(address: str) -> str:
    """The suffix, with that of the compressed file before a compression's."""
    name = name_of(address)
    inner = PurePath(name.stem).suffix if name.suffix.lower() in COMPRESSIONS else ""
    return f"{inner}{name.suffix}".lower()
