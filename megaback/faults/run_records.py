"""Validation of a run's records as they are read: a run's folder may be untrusted.

Records of other versions may have fewer fields or more. Loads no torch.
"""

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.number_ranges import FP32_MAX, INT64_MAX
from data_pipeline.common.regular_files import open_file

MAX_RECORD_BYTES = 1 << 20
"""Maximum size of a line, or of a file that is one record."""
_YEAR_9000 = 221_845_392_000


@dataclass(frozen=True)
class Fields:
    """Types of a record's fields; any of them may be absent."""

    counts: frozenset[str] = frozenset()
    times: frozenset[str] = frozenset()
    """Seconds since the epoch."""
    numbers: frozenset[str] = frozenset()
    """Numbers or null."""
    texts: frozenset[str] = frozenset()
    """Texts or null."""

    def problem(self, record: Mapping[str, Any]) -> str | None:
        """Name of the first field with an invalid value, if there is one."""
        for name, value in record.items():
            is_wrong = (
                (name in self.counts and not (type(value) is int and abs(value) <= INT64_MAX))
                or (name in self.times and not _is_within(value, 0, _YEAR_9000))
                or (
                    name in self.numbers
                    and not _is_within(value, -FP32_MAX, FP32_MAX, or_null=True)
                )
                or (name in self.texts and not isinstance(value, str | None))
            )
            if is_wrong:
                return name
        return None


def _is_within(value: Any, minimum: float, maximum: float, *, or_null: bool = False) -> bool:
    if value is None:
        return or_null
    return type(value) in (int, float) and bool(minimum <= value <= maximum)


def lines_of(path: Path, max_bytes: int = MAX_RECORD_BYTES) -> Iterator[bytes]:
    """The lines of a file. Raises OSError, and ValueError for one of more than `max_bytes`."""
    with open(open_file(path), "rb") as file:  # noqa: PTH123 (a descriptor)
        number = 0
        while line := file.readline(max_bytes + 1):
            number += 1
            if len(line) > max_bytes:
                raise ValueError(f"line {number} has more than {max_bytes:,} bytes")
            yield line


def last_lines(path: Path, max_bytes: int) -> list[bytes]:
    """The complete lines within the last `max_bytes` of a file. Raises OSError."""
    with open(open_file(path), "rb") as file:  # noqa: PTH123 (a descriptor)
        size = file.seek(0, os.SEEK_END)
        file.seek(max(size - max_bytes, 0))
        data = file.read(max_bytes)
    return data.split(b"\n")[1 if size > max_bytes else 0 :]
