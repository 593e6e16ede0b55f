"""Files behind URLs, for every file system that fsspec knows: what is there, and its bytes.

A file is read part by part, each part with its own retries, so that a long file survives a bad
network and memory stays bounded. Nothing is kept between calls: a process may fork at any time.
"""

import hashlib
import io
import re
from collections.abc import Callable, Mapping
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, TypeVar

from data_pipeline.errors import (
    BackendError,
    MegabackError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.redaction import shown_url
from data_pipeline.storage import retries
from data_pipeline.storage.address_variables import expanded
from data_pipeline.storage.http_ranges import CLIENT_OPTIONS, FileFacts, fetch_facts, fetch_range
from data_pipeline.storage.retries import TransientError, reason_of, require_hub, with_retries
from data_pipeline.storage.stamps import STAMPED_BYTES, stamp_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

Result = TypeVar("Result")

BLOCK_BYTES = 8 << 20

_HTTP = ("http", "https")
_PINNED_REVISION = re.compile(r"@[0-9a-f]{40}/")
# What names the content comes before what names the moment: a copy has another moment. Listing a
# folder and looking at a file must agree, so the first of these that a file system reports decides.
_VERSION_KEYS = (
    *("lfs", "blob_id", "xet_hash"),  # the Hugging Face hub
    *("ETag", "etag", "e_tag"),  # S3, Google, Azure
    *("md5Hash", "content_md5", "crc32c", "checksum", "generation", "version_id"),
    *("mtime", "LastModified", "last_modified", "modified", "updated"),
)


def is_http(url: str) -> bool:
    """Whether an address is one of a web server, which gives files but lists none."""
    return url.partition("://")[0].lower() in _HTTP


def url_path(url: str) -> PurePosixPath:
    """The path of an address, without the query that a signed address carries."""
    rest = url.partition("://")[2]
    return PurePosixPath(re.split(r"[?#]", rest)[0] if is_http(url) else rest)


def find(url: str) -> tuple[list[str], list[list[str]], list[str]]:
    """The files that an address names, and for each folder that it names the files below.

    A pattern may name several of both. Third: the hidden files, which are in neither. Over http
    only a file can be named. Raises SourceMissingError, SourceUnreadableError, BackendError.
    """
    if is_http(url):
        return [url], [], []  # that it is there is found when it is looked at
    file_system, path = open_file_system(url)
    timeout_s = retries.POLICY.listing_timeout_s
    address_of = _addresses(url, file_system, path)

    def look() -> tuple[list[str], list[list[str]], list[str]]:
        _require_hub_of(file_system)
        file_system.invalidate_cache()
        pinned = _pinned(path) if file_system.protocol == "hf" else path
        try:
            found = {pinned: call(file_system, "info", pinned, timeout_s=timeout_s)}
        except FileNotFoundError:
            found = call(file_system, "glob", pinned, detail=True, timeout_s=timeout_s)
        files: list[str] = []
        folders: list[list[str]] = []
        hidden: list[str] = []
        for name, info in found.items():
            if name != pinned and _is_hidden(name):
                hidden.append(address_of(name))
            elif info["type"] == "directory":
                folders.append([])
                for other in call(file_system, "find", name, timeout_s=timeout_s):
                    some = hidden if _is_hidden(other, name) else folders[-1]
                    some.append(address_of(other))
            else:
                files.append(address_of(name))
        return files, folders, hidden

    try:
        return guarded(url, look)
    except FileNotFoundError:
        return [], [], []


def _addresses(url: str, file_system: Any, path: str) -> Callable[[str], str]:
    """What gives a file's address by the name that a file system has listed it under.

    Names of drivers that connect to a host (sftp, ftp) lack it, and the login to it.
    """
    protocol, separator, rest = url.partition("://")
    authority = rest.partition("/")[0]
    whole = expanded(url).partition("://")[2]
    if path.startswith("/") and whole.endswith(path) and whole != path:
        return lambda name: f"{protocol}{separator}{authority}{name}"
    unstripped: Callable[[str], str] = file_system.unstrip_protocol
    return unstripped


class RemoteFile(io.RawIOBase):
    """A file behind a URL, as a raw file: each read is one request, and reads can be anywhere."""

    def __init__(self, url: str) -> None:
        """Looks at the file. Raises FileNotFoundError, SourceUnreadableError, BackendError."""
        self.url = url
        self._shown = shown_url(url)
        self._file_system, self._path = open_file_system(url)
        self._is_http = is_http(url)
        self._position = 0
        facts = guarded(url, self._http_facts if self._is_http else self._other_facts)
        self._facts = facts
        self.size_bytes = facts.size_bytes

    def stamp(self) -> str:
        """Digest of size and version or, where there is no version, of size, head and tail.

        Raises SourceUnreadableError, FileNotFoundError.
        """
        size_bytes, version = self._facts.size_bytes, self._facts.version
        if version is not None:
            return hashlib.sha256(f"{size_bytes}:{version}".encode()).hexdigest()
        head = self._read_at(0, min(STAMPED_BYTES, size_bytes))
        tail = self._read_at(max(0, size_bytes - STAMPED_BYTES), size_bytes)
        return stamp_of(size_bytes, head, tail)

    def buffered(self) -> io.BufferedReader:
        """The file for reading from its beginning to its end, in large blocks."""
        return io.BufferedReader(self, BLOCK_BYTES)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size_bytes}[whence]
        self._position = max(0, base + offset)
        return self._position

    def readinto(self, buffer: "WriteableBuffer") -> int:
        """Fills at most one block of a buffer."""
        view = memoryview(buffer).cast("B")
        stop = min(self._position + min(len(view), BLOCK_BYTES), self.size_bytes)
        if stop <= self._position:
            return 0
        part = self._read_part(self._position, stop)
        view[: len(part)] = part
        self._position += len(part)
        return len(part)

    def read(self, size: int | None = -1, /) -> bytes:
        """All of the bytes asked for, unlike most raw files: parquet's reader relies on it."""
        whole = size is None or size < 0
        stop = self.size_bytes if whole else min(self._position + (size or 0), self.size_bytes)
        part = self._read_at(self._position, stop)
        self._position += len(part)
        return part

    def _read_at(self, start: int, stop: int) -> bytes:
        parts = []
        while start < stop:
            parts.append(self._read_part(start, min(stop, start + BLOCK_BYTES)))
            start += len(parts[-1])
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _read_part(self, start: int, stop: int) -> bytes:
        """At least one byte from `start` on, and none from `stop` on."""
        fetch = self._http_range if self._is_http else self._other_range
        return guarded(self.url, lambda: fetch(start, stop))

    def _http_facts(self) -> FileFacts:
        from fsspec.asyn import sync

        facts: FileFacts = sync(
            self._file_system.loop, fetch_facts, self._file_system, self._path, self._shown
        )
        return facts

    def _http_range(self, start: int, stop: int) -> bytes:
        from fsspec.asyn import sync

        arguments = (self._file_system, self._path, self._shown, start, stop, self._facts)
        part: bytes = sync(self._file_system.loop, fetch_range, *arguments)
        return part

    def _other_facts(self) -> FileFacts:
        _require_hub_of(self._file_system)
        if not _PINNED_REVISION.search(self.url):  # what was listed before may be old by now
            self._file_system.invalidate_cache(self._path)
        timeout_s = retries.POLICY.request_timeout_s
        info = call(self._file_system, "info", self._path, timeout_s=timeout_s)
        if info["type"] == "directory":
            raise IsADirectoryError(f"{self._shown}: a folder, not a file")
        if info.get("size") is None:
            raise SourceUnreadableError(
                f"{self._shown}: its size is not known, without which no part of it can be read; "
                "copy the file and name its path"
            )
        return FileFacts(int(info["size"]), _version(info))

    def _other_range(self, start: int, stop: int) -> bytes:
        part: bytes = call(
            self._file_system,
            "cat_file",
            self._path,
            start=start,
            end=stop,
            timeout_s=retries.POLICY.request_timeout_s,
            # The hub's driver would read ahead what the next request reads again.
            **({"cache_type": "none"} if self._file_system.protocol == "hf" else {}),
        )
        if len(part) < stop - start:
            raise TransientError(f"{len(part)} of {stop - start} bytes came")
        if len(part) > stop - start:
            raise SourceUnreadableError(
                f"{self._shown}: more bytes came than were asked for; copy the file and name its "
                "path"
            )
        return part


def open_file_system(url: str) -> tuple[Any, str]:
    """The file system of an address, and the address as it takes it, secrets and all.

    Some drivers connect here. Raises SourceMissingError, BackendError, SourceUnreadableError, and
    ConfigError for a variable that is not set.
    """
    import fsspec

    shown = shown_url(url)
    url = expanded(url)
    protocol, separator, rest = url.partition("://")
    protocol = protocol.lower()
    url = f"{protocol}{separator}{rest}"
    if not rest.strip("/"):
        raise SourceMissingError(f"{shown}: names no file; write `{protocol}://` and its address")
    if "::" in url and protocol not in _HTTP:
        raise SourceMissingError(
            f"{shown}: a file within a file (`::`) cannot be read in parts; "
            "unpack it and name the folder"
        )

    def start() -> tuple[Any, str]:
        try:
            if protocol in _HTTP:
                return fsspec.filesystem(protocol, client_kwargs=dict(CLIENT_OPTIONS)), url
            file_system, path = fsspec.url_to_fs(url)
        except ImportError as error:
            raise BackendError(
                f"{shown}: {reason_of(error)}; {protocol}:// needs that package"
            ) from None
        except ValueError as error:
            raise SourceMissingError(f"{shown}: {reason_of(error)}; check the address") from None
        return file_system, path

    return guarded(url, start)


def _require_hub_of(file_system: Any) -> None:
    """Raises UnresolvedHostError when it is the hub's, and the hub cannot be found."""
    if file_system.protocol == "hf":
        require_hub()


def _pinned(path: str) -> str:
    """A path on the Hugging Face hub at the commit of this moment, whatever is pushed later."""
    from huggingface_hub import HfApi, HfFileSystem

    resolved: Any = HfFileSystem().resolve_path(path)
    if not hasattr(resolved, "repo_id"):  # a bucket has no commits
        return path
    kind, name, revision = resolved.repo_type, resolved.repo_id, resolved.revision
    commit = HfApi().repo_info(name, repo_type=kind, revision=revision).sha
    return f"{resolved.root.partition('@')[0]}@{commit}/{resolved.path_in_repo}".rstrip("/")


def call(file_system: Any, method: str, *arguments: Any, timeout_s: float, **options: Any) -> Any:
    """A method of a file system, with a time limit where the file system can be interrupted."""
    from fsspec.asyn import AsyncFileSystem, sync

    if isinstance(file_system, AsyncFileSystem):
        function = getattr(file_system, f"_{method}")
        return sync(file_system.loop, function, *arguments, timeout=timeout_s, **options)
    return getattr(file_system, method)(*arguments, **options)


def guarded(url: str, attempt: Callable[[], Result]) -> Result:
    """The result of an attempt with retries; whatever a driver raises becomes one sentence.

    Raises FileNotFoundError as it is, since only the caller knows what it means.
    """
    try:
        return with_retries(shown_url(url), attempt)
    except (MegabackError, FileNotFoundError):
        raise
    except Exception as error:  # noqa: BLE001 - each driver has errors of its own
        raise SourceUnreadableError(
            f"{shown_url(url)}: {reason_of(error)}; "
            "check the address, and that you are allowed to read it"
        ) from None


def _version(info: Mapping[str, Any]) -> str | None:
    for key in _VERSION_KEYS:
        value = info.get(key)
        if value:
            return str(value["sha256"] if key == "lfs" else value)
    return None


def _is_hidden(name: str, folder: str | None = None) -> bool:
    """Whether a name or, below a folder, any part of it begins with a dot."""
    path = PurePosixPath(name.removeprefix(folder or ""))
    return any(part.startswith(".") for part in (path.parts if folder else (path.name,)))
