"""A folder behind a URL: its files by name, whole or in parts, for many threads at once.

One driver, and so one set of connections, serves a folder. Nothing that it keeps outlives a fork:
a child process opens a driver of its own.
"""

import errno
import os
from typing import Any

from data_pipeline.common.file_names import plain_name
from data_pipeline.common.regular_files import too_large
from data_pipeline.errors import SourceUnreadableError
from data_pipeline.redaction import shown_url
from data_pipeline.storage import remote_file, retries
from data_pipeline.storage.address_variables import expanded, kept
from data_pipeline.storage.http_ranges import FileFacts, fetch_part
from data_pipeline.storage.origins import origin_of
from data_pipeline.storage.remote_file import RemoteFile, call, guarded, open_file_system
from data_pipeline.storage.retries import TransientError

_TAIL_BYTES = 1 << 16
"""Of a file's end are fetched at least: of a small file everything but its frames is there."""


class RemoteFolder:
    """A folder behind a URL; over http the query of its address goes with every file's."""

    def __init__(self, url: str) -> None:
        """Asks for nothing yet. Raises SourceMissingError, BackendError, ConfigError."""
        url = kept(url)
        self._address, self._query = _parted(url)
        self.shown = shown_url(self._address)
        self._driver: tuple[int, Any] | None = None
        driver = self.file_system()
        self.origin = origin_of(*_parted(expanded(url)), driver)
        """Who decides what lies there."""

    def url(self, name: str) -> str:
        """The address of one of its files. Raises ValueError for a name that is no file's."""
        return f"{self._address}/{plain_name(name)}{self._query}"

    def read(self, name: str, max_bytes: int) -> bytes:
        """All of a file, which has no more bytes. Raises OSError, SourceUnreadableError."""
        url = self.url(name)
        file = RemoteFile(url)
        if file.size_bytes > max_bytes:
            raise too_large(max_bytes, shown_url(url))
        return file.read()

    def ranges(self, name: str, expected_bytes: int) -> "RemoteRanges":
        """A file that should be so large; asks for nothing yet. Raises as `url`."""
        return RemoteRanges(self, name, expected_bytes)

    def file_system(self) -> Any:
        """The driver of this process."""
        # No lock, which a fork could leave held: at worst, two threads open a driver each.
        driver = self._driver
        if driver is None or driver[0] != os.getpid():
            driver = self._driver = os.getpid(), open_file_system(self._address)[0]
        return driver[1]


def _parted(url: str) -> tuple[str, str]:
    """The address of a folder, and the query that goes behind its files' names."""
    address, separator, query = url.partition("?") if remote_file.is_http(url) else (url, "", "")
    return address.partition("#")[0].rstrip("/"), separator + query


class RemoteRanges:
    """One file of such a folder, as byte_ranges.py says: each part is one request."""

    def __init__(self, folder: RemoteFolder, name: str, expected_bytes: int) -> None:
        """Asks for nothing: that the size is another one shows when the tail is read."""
        self._url = folder.url(name)
        self.shown = shown_url(self._url)
        self._folder = folder
        self._is_http = remote_file.is_http(self._url)
        self._path = open_file_system(self._url)[1]
        self._size_bytes = expected_bytes
        self._facts: FileFacts | None = None

    def tail(self, num_bytes: int) -> tuple[int, bytes]:
        self._facts = None
        num_bytes = max(num_bytes, _TAIL_BYTES)
        # One byte more than there should be, so that one request tells the size with any driver.
        start = max(0, self._size_bytes - num_bytes)
        facts, part = self._fetch(start, self._size_bytes + 1)
        if len(part) == self._size_bytes - start and facts.size_bytes == self._size_bytes:
            self._facts = facts
            return self._size_bytes, part
        self._size_bytes = facts.size_bytes
        self._facts = facts
        start = max(0, self._size_bytes - num_bytes)
        return self._size_bytes, self.read_at(start, self._size_bytes - start)

    def read_at(self, offset: int, num_bytes: int) -> bytes:
        data = b""
        while len(data) < num_bytes:
            facts, part = self._fetch(offset + len(data), offset + num_bytes)
            if self._facts is not None and facts != self._facts:
                raise OSError(errno.ESTALE, "the file was replaced since it was opened")
            if not part:
                break
            data = data + part if data else part
        return data

    def close(self) -> None:
        pass

    def _fetch(self, start: int, stop: int) -> tuple[FileFacts, bytes]:
        fetch = self._fetch_http if self._is_http else self._fetch_other
        return guarded(self._url, lambda: fetch(start, stop))

    def _fetch_http(self, start: int, stop: int) -> tuple[FileFacts, bytes]:
        from fsspec.asyn import sync

        file_system = self._folder.file_system()
        fetched: tuple[FileFacts, bytes] = sync(
            file_system.loop, fetch_part, file_system, self._path, self.shown, start, stop
        )
        return fetched

    def _fetch_other(self, start: int, stop: int) -> tuple[FileFacts, bytes]:
        """Other drivers say nothing of the file beside its bytes: only asked when it matters."""
        file_system = self._folder.file_system()
        timeout_s = retries.POLICY.request_timeout_s
        # The hub's driver would read ahead what the next request reads again.
        options = {"cache_type": "none"} if file_system.protocol == "hf" else {}
        part: bytes = call(
            file_system,
            "cat_file",
            self._path,
            start=start,
            end=stop,
            timeout_s=timeout_s,
            **options,
        )
        if len(part) > stop - start:
            raise SourceUnreadableError(
                f"{self.shown}: more bytes came than were asked for; copy the folder and name its "
                "path"
            )
        if len(part) == min(stop, self._size_bytes) - start:
            return FileFacts(self._size_bytes, None), part
        file_system.invalidate_cache(self._path)
        size_bytes = call(file_system, "info", self._path, timeout_s=timeout_s).get("size")
        if size_bytes == self._size_bytes:
            raise TransientError(f"{len(part)} of {stop - start} bytes came")
        if size_bytes is None:
            raise SourceUnreadableError(
                f"{self.shown}: its size is not known, without which no part of it can be read; "
                "copy the folder and name its path"
            )
        return FileFacts(int(size_bytes), None), part
