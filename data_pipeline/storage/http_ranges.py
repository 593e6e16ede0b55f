"""HTTP range requests, with an error when the server does not support them.

Only the requested bytes are held in memory. A response's status, range, length and file version are
checked against the request.
"""

import asyncio
import errno
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.storage import retries
from data_pipeline.storage.retries import TransientError

CLIENT_OPTIONS = {
    "trust_env": True,  # the proxies of a cluster
    "auto_decompress": False,  # compressed files are decompressed by suffix
}
_MIN_BYTES_PER_S = 16 << 10
"""Minimum average rate, below which a server counts as stalled."""
_MIN_PART_BYTES = 64 << 10
"""Minimum size of a partial response."""
_CONTENT_RANGE = re.compile(r"bytes (?:(\d+)-(\d+)|\*)/(\d+|\*)")


@dataclass(frozen=True)
class FileFacts:
    """Size and version of a file, as reported by a server or file system."""

    size_bytes: int
    version: str | None
    """ETag, checksum or modification time; None if none is reported."""


async def fetch_part(
    file_system: Any, url: str, shown: str, start: int, stop: int
) -> tuple[FileFacts, bytes]:
    """Size and version of a file, and its bytes `start` to `stop` or a prefix of them.

    Past the end of the file there are no bytes. `shown`: address for messages. Raises
    FileNotFoundError, PermissionError, SourceUnreadableError, and transient errors.
    """
    import aiohttp

    session = await file_system.set_session()
    options = dict(file_system.kwargs)
    headers = {
        **options.pop("headers", {}),
        "Accept-Encoding": "identity",
        "Range": f"bytes={start}-{stop - 1}",
    }
    stall_s = retries.POLICY.stall_timeout_s
    max_s = stall_s + (stop - start) / _MIN_BYTES_PER_S
    options["timeout"] = aiohttp.ClientTimeout(total=max_s, connect=stall_s, sock_read=stall_s)
    async with session.get(file_system.encode_url(url), headers=headers, **options) as response:
        _require_success(response, shown)
        first, num_bytes, size_bytes = _answered_range(response, shown)
        is_past_end = response.status == 416 and start >= size_bytes
        min_bytes = min(stop - start, size_bytes - start, _MIN_PART_BYTES)
        if not is_past_end and (
            first != start or not max(0, min_bytes) <= num_bytes <= stop - start
        ):
            raise _no_ranges(shown)
        version = response.headers.get("ETag") or response.headers.get("Last-Modified")
        try:
            body = await response.content.readexactly(num_bytes)
        except (asyncio.IncompleteReadError, aiohttp.ClientPayloadError):
            raise TransientError(f"the response of {num_bytes:,} bytes was truncated") from None
        return FileFacts(size_bytes, version), body


def _require_success(response: Any, shown: str) -> None:
    status = response.status
    message = f"the server returned {status} {response.reason or ''}".strip()
    if status in (404, 410):
        raise FileNotFoundError(errno.ENOENT, message, shown)
    if status in (401, 403):
        raise PermissionError(errno.EACCES, message, shown)
    if status in retries.TRANSIENT_STATUSES:
        raise TransientError(message, _wait_s(response.headers))
    if status not in (200, 206, 416):
        raise SourceUnreadableError(f"{shown}: {message}; check the address")


def _wait_s(headers: Mapping[str, str]) -> float:
    try:
        return float(headers.get("Retry-After", 0))
    except ValueError:  # a date: use the default wait
        return 0.0


def _answered_range(response: Any, shown: str) -> tuple[int, int, int]:
    """First byte, number of bytes and size of the whole file."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", "").strip())
    length = response.headers.get("Content-Length", "")
    if response.status == 200 and length in ("0", "1"):  # the whole file
        return 0, int(length), int(length)
    if match is None or match[3] == "*" or (match[1] is None) != (response.status == 416):
        raise _no_ranges(shown)
    if match[1] is None:
        return 0, 0, int(match[3])
    return int(match[1]), int(match[2]) - int(match[1]) + 1, int(match[3])


def _no_ranges(shown: str) -> SourceUnreadableError:
    return SourceUnreadableError(
        f"{shown}: the server does not support range requests; download the file and name its path"
    )
