"""Size limits of a record: a line, a row, an element of an array, a whole text or page.

A longer one is a malformed record, detected without holding it in memory. All limits derive from
one number, such that reading takes less than 1 GiB per process with the default.
"""

from collections.abc import Iterable

import click

from data_pipeline.common.number_ranges import RECORD_BYTES
from data_pipeline.errors import BadRecordError

DEFAULT_MAX_RECORD_BYTES = 32 << 20
"""Maximum bytes of a record; such a text takes 600 MiB until encoded: docs/decisions/0037."""
_BYTES_PER_PAGE_BYTE = 16
"""Divisor of the limit for pages, whose trees take 150 to 330 bytes per byte."""
_BYTES_PER_VALUE = 8
"""Divisor of the limit for values: an object of up to 70 bytes for each of `,:[{`."""

TOO_LONG = "too long"
"""Cause under which such records are counted."""

max_record_bytes_option = click.option(
    "--max-record-bytes",
    type=RECORD_BYTES.option,
    default=DEFAULT_MAX_RECORD_BYTES,
    show_default=True,
    help="Maximum bytes of a line, row or document; a longer one is a malformed record.",
)


def page_bytes(max_record_bytes: int) -> int:
    """Maximum bytes of an HTML page."""
    return max_record_bytes // _BYTES_PER_PAGE_BYTE


def max_values(max_record_bytes: int) -> int:
    """Maximum number of the characters `,:[{` in a JSON record, strings included."""
    return max_record_bytes // _BYTES_PER_VALUE


def holds_too_many_values(record: bytes | str, max_record_bytes: int) -> bool:
    """Whether a parsed JSON record may take far more memory than its text.

    >>> holds_too_many_values(b'[[],[],[],[],[]]', 64)
    True
    """
    maximum = max_values(max_record_bytes)
    if len(record) <= maximum:
        return False
    if isinstance(record, bytes):
        return sum(map(record.count, (b",", b":", b"[", b"{"))) > maximum
    return sum(map(record.count, ",:[{")) > maximum


def is_longer(text: str | None, max_bytes: int) -> bool:
    """Whether a text has more than `max_bytes` bytes of UTF-8."""
    if text is None or 4 * len(text) <= max_bytes:
        return False
    return len(text) > max_bytes or len(text.encode("utf-8", "surrogatepass")) > max_bytes


def joined(pieces: Iterable[bytes], max_bytes: int) -> bytes | None:
    """The joined pieces; None if they are longer than `max_bytes`."""
    parts = []
    num_bytes = 0
    for piece in pieces:
        num_bytes += len(piece)
        if num_bytes > max_bytes:
            return None
        parts.append(piece)
    return b"".join(parts)


def too_long(where: str, max_record_bytes: int, what: str = "longer than") -> BadRecordError:
    """The error for a record that is too long, prefixed with `where`."""
    return BadRecordError(
        f"{where}: {what} `max_record_bytes` {max_record_bytes} allows; raise the limit if there "
        "is memory for 20 times as much, or remove the record",
        TOO_LONG,
    )
