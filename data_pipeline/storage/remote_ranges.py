"""Range reads of a file behind a URL, used for all reads over a network."""

import errno
import logging
import re
from collections.abc import Mapping
from typing import Any

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.redaction import shown_url
from data_pipeline.storage import retries
from data_pipeline.storage.drivers import Driver, call, guarded, require_reachable
from data_pipeline.storage.http_ranges import FileFacts, fetch_part
from data_pipeline.storage.retries import TransientError
from data_pipeline.storage.urls import is_http

_LOG = logging.getLogger("megaback.sources")
_TAIL_BYTES = 1 << 16
"""Minimum size of a tail request: it includes the index and seek table of small shards."""
_PINNED_REVISION = re.compile(r"@[0-9a-f]{40}/")
# Identifiers of content precede times, which differ between copies. The first key that a file
# system reports is used, so that listing a folder and requesting a file agree.
_VERSION_KEYS = (
    *("lfs", "blob_id", "xet_hash"),  # the Hugging Face hub
    *("ETag", "etag", "e_tag"),  # S3, Google, Azure
    *("md5Hash", "content_md5", "crc32c", "checksum", "generation", "version_id"),
    *("mtime", "LastModified", "last_modified", "modified", "updated"),
)


class RemoteRanges:
    """ByteRanges of a URL: one request with retries per read.

    `look` or `tail` determines the version; reads of another version raise OSError.
    """

    def __init__(self, url: str, expected_bytes: int = 0, driver: Driver | None = None) -> None:
        """Sends no request. `driver`: a driver of the same server to share.

        Raises SourceMissingError, BackendError, SourceUnreadableError, ConfigError.
        """
        own = Driver(url)
        self._url, self._path = url, own.path
        self.shown = shown_url(url)
        self._driver = driver or own
        self._is_http = is_http(url)
        self._size_bytes = expected_bytes
        self._facts: FileFacts | None = None

    def look(self) -> FileFacts:
        """Size and version of the file. Raises FileNotFoundError, SourceUnreadableError."""
        # A GET of one byte over HTTP: signed addresses allow no other method.
        ask = (lambda: self._fetch_http(0, 1)[0]) if self._is_http else self._info
        self._facts = guarded(self._url, ask)
        self._size_bytes = self._facts.size_bytes
        return self._facts

    def tail(self, num_bytes: int) -> tuple[int, bytes]:
        self._facts = None
        num_bytes = max(num_bytes, _TAIL_BYTES)
        # One byte more than expected, so that one request determines the size with any driver.
        start = max(0, self._size_bytes - num_bytes)
        facts, part = self._fetch(start, self._size_bytes + 1)
        self._facts = facts
        if len(part) == self._size_bytes - start and facts.size_bytes == self._size_bytes:
            return self._size_bytes, part
        self._size_bytes = facts.size_bytes
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
        """Facts of the file, and its bytes `start` to `stop` or a prefix of them."""
        _LOG.debug("%s: fetching bytes %d to %d", self.shown, start, stop)
        fetch = self._fetch_http if self._is_http else self._fetch_other
        return guarded(self._url, lambda: fetch(start, stop))

    def _fetch_http(self, start: int, stop: int) -> tuple[FileFacts, bytes]:
        from fsspec.asyn import sync

        file_system = self._driver.file_system()
        arguments = (file_system, self._path, self.shown, start, stop)
        fetched: tuple[FileFacts, bytes] = sync(file_system.loop, fetch_part, *arguments)
        return fetched

    def _fetch_other(self, start: int, stop: int) -> tuple[FileFacts, bytes]:
        """Fetch with another driver, whose reads include no facts: requested only when needed."""
        file_system = self._driver.file_system()
        timeout_s = retries.POLICY.request_timeout_s
        # The hub's driver would read ahead, and the next request would fetch it again.
        options = {"cache_type": "none"} if file_system.protocol == "hf" else {}
        where = {"start": start, "end": stop}
        part: bytes = call(
            file_system, "cat_file", self._path, timeout_s=timeout_s, **where, **options
        )
        if len(part) > stop - start:
            raise SourceUnreadableError(
                f"{self.shown}: the response is longer than the requested range; download the file "
                "and name its path"
            )
        facts = self._facts or FileFacts(self._size_bytes, None)
        if len(part) != min(stop, facts.size_bytes) - start:
            found = self._info()
            if found.size_bytes == facts.size_bytes:
                raise TransientError(f"received {len(part)} of {stop - start} bytes")
            facts = found
        return facts, part

    def _info(self) -> FileFacts:
        """Facts of the file by a driver other than HTTP's."""
        file_system = self._driver.file_system()
        require_reachable(file_system)
        if not _PINNED_REVISION.search(self._url):  # a listing may be outdated
            file_system.invalidate_cache(self._path)
        timeout_s = retries.POLICY.request_timeout_s
        info = call(file_system, "info", self._path, timeout_s=timeout_s)
        if info["type"] == "directory":
            raise IsADirectoryError(f"{self.shown}: a folder, not a file")
        if info.get("size") is None:
            raise SourceUnreadableError(
                f"{self.shown}: the server does not report its size; download the file and name "
                "its path"
            )
        return FileFacts(int(info["size"]), _version(info))


def _version(info: Mapping[str, Any]) -> str | None:
    for key in _VERSION_KEYS:
        value = info.get(key)
        if value:
            return str(value["sha256"] if key == "lfs" else value)
    return None
