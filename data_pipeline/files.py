"""The files of a source, wherever they lie: found, looked at and opened in one way.

A file has an address: an absolute path on this machine, or a URL. Paths are read natively.
"""

import glob
import os
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol

from data_pipeline import remote
from data_pipeline.errors import SourceMissingError
from data_pipeline.slices import file_stamp

COMPRESSIONS = (".gz", ".zst")
_KINDS = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".txt", ".md", ".rst"), "text"),
}
_SUFFIXES = f"{', '.join(_KINDS)} (all but .parquet also with {' or '.join(COMPRESSIONS)})"
_LOCAL_URL = "file://"
_PARQUET_BUFFER_BYTES = 1 << 20


class DataFile(Protocol):
    """A file of a source, looked at once."""

    shown: str
    """Its address, for messages."""
    size_bytes: int
    stamp: str

    def stream(self) -> BinaryIO:
        """The bytes from the first to the last. Raises OSError, SourceUnreadableError."""

    def parquet(self) -> tuple[Any, int]:
        """What parquet's reader opens, and how many bytes of a column it should read at once."""


class LocalFile:
    """A file on this machine."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self.shown = str(path)
        self.size_bytes = path.stat().st_size
        self.stamp = file_stamp(path)
        self._path = path

    def stream(self) -> BinaryIO:
        return self._path.open("rb")

    def parquet(self) -> tuple[Any, int]:
        return self._path, _PARQUET_BUFFER_BYTES


class UrlFile:
    """A file behind a URL."""

    def __init__(self, url: str) -> None:
        """Raises FileNotFoundError, SourceUnreadableError, BackendError."""
        self._file = remote.RemoteFile(url)
        self.shown = remote.shown_url(url)
        self.size_bytes = self._file.size_bytes
        self.stamp = self._file.stamp()

    def stream(self) -> BinaryIO:
        return self._file.buffered()

    def parquet(self) -> tuple[Any, int]:
        # Columns are read in turn: one buffer before them all would be filled again at each turn.
        return self._file, remote.BLOCK_BYTES


def look_at(address: str) -> DataFile:
    """Looks at a file. Raises OSError, SourceUnreadableError, BackendError."""
    return UrlFile(address) if remote.is_url(address) else LocalFile(Path(address))


def local_path(source: str) -> Path | None:
    """The path that a source names; None for the URL of another machine."""
    if source.startswith(_LOCAL_URL):
        return Path(source.removeprefix(_LOCAL_URL))
    return None if remote.is_url(source) else Path(source).expanduser()


def name_of(address: str) -> PurePath:
    """The last part of an address."""
    path = remote.url_path(address) if remote.is_url(address) else PurePath(address)
    return PurePath(path.name)


def kind_of(address: str) -> str | None:
    """`parquet`, `jsonl` or `text` by the suffix; None for a file that is not read."""
    name = name_of(address)
    suffix = name.suffix.lower()
    if suffix in COMPRESSIONS:
        kind = _KINDS.get(PurePath(name.stem).suffix.lower())
        return None if kind == "parquet" else kind
    return _KINDS.get(suffix)


def find_files(source: str) -> list[str]:
    """The addresses of a source's files that can be read, sorted.

    Raises OSError, SourceMissingError, SourceUnreadableError, BackendError.
    """
    path = local_path(source)
    if path is None:
        files, folders = remote.find(source)
    elif source in ("", _LOCAL_URL):  # Path("") would be the folder we are in
        files, folders = [], []
    else:
        files, folders = _find_local(path)
    if not files and not folders:
        raise SourceMissingError(
            f"{remote.shown_url(source) or '(empty)'}: there is no such file or folder, "
            "and no file matches it as a pattern; a source is `pydocs`, a path, a URL, "
            "a quoted pattern, or `hf:NAME` on the hub"
        )
    readable = {address for address in files if kind_of(address)}
    for below in folders:
        readable.update(_data_of(below))
    if not readable:
        shown = remote.shown_url(source)
        raise SourceMissingError(f"{shown}: no file has a suffix that can be read: {_SUFFIXES}")
    return sorted(readable, key=lambda address: address.split("/"))


def _data_of(files: list[str]) -> list[str]:
    """The files of a folder that hold its data: beside data, a text is a README or a licence."""
    texts = [address for address in files if kind_of(address) == "text"]
    return [address for address in files if kind_of(address) not in ("text", None)] or texts


def _find_local(path: Path) -> tuple[list[str], list[list[str]]]:
    if path.exists():
        matches = [path]
    else:
        # Path.glob takes no absolute patterns.
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    # Not resolved: the files that a hub cache links to have no suffix.
    absolute = [Path(os.path.abspath(match)) for match in matches]  # noqa: PTH100
    return (
        [str(match) for match in absolute if not match.is_dir()],
        [list(_files_below(match)) for match in absolute if match.is_dir()],
    )


def _files_below(root: Path) -> Iterator[str]:
    def stop(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (str(Path(folder, name)) for name in names if not name.startswith("."))
