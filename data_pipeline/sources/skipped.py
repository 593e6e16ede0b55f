"""Counts of skipped files and records, by kind and cause, with their first places.

Files are counted when a source is listed; records, and parts of records, when they are read. Counts
of several tasks are merged in the order of the tasks, so that they do not depend on scheduling.
"""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from data_pipeline.common.checked_json import checked, require_within
from data_pipeline.common.command import with_options
from data_pipeline.common.number_ranges import INT64_MAX
from data_pipeline.redaction import scrub

FILES = "files"
RECORDS = "records"
PARTS = "parts"
"""Skipped parts of records, for example single exchanges of a chat."""

_MAX_FIRST = {FILES: 3, RECORDS: 10, PARTS: 3}
_MAX_PLACE_CHARACTERS = 300
_NOUNS = {
    FILES: ("file", "files"),
    RECORDS: ("record", "records"),
    PARTS: ("part of a record", "parts of records"),
}


@dataclass(frozen=True)
class Tally:
    """Number of occurrences of a cause, and the first places."""

    count: int
    first: tuple[str, ...]

    def plus(self, other: "Tally", max_first: int) -> "Tally":
        first = tuple(dict.fromkeys((*self.first, *other.first)))[:max_first]
        return Tally(self.count + other.count, first)


Skipped = dict[str, dict[str, Tally]]
"""Tally of each cause, by kind."""


def count_skipped(skipped: Skipped, kind: str, cause: str, place: str, number: int = 1) -> None:
    """Count skipped files, records or parts."""
    _add(skipped, kind, cause, Tally(number, (place[:_MAX_PLACE_CHARACTERS],)))


def add_skipped(total: Skipped, part: Skipped) -> None:
    """Add counts to a total; the places of earlier counts come first."""
    for kind, causes in part.items():
        for cause, tally in causes.items():
            _add(total, kind, cause, tally)


def merged(parts: Iterable[Skipped]) -> Skipped:
    """The sum of counts, in a fixed order of kinds and causes."""
    total: Skipped = {}
    for part in parts:
        add_skipped(total, part)
    return {
        kind: dict(sorted(total[kind].items())) for kind in (FILES, RECORDS, PARTS) if kind in total
    }


def skipped_to_json(skipped: Skipped) -> dict[str, Any]:
    return {
        kind: {cause: asdict(tally) for cause, tally in causes.items()}
        for kind, causes in skipped.items()
    }


def skipped_from_json(fields: Mapping[str, Any]) -> Skipped:
    """Inverse of `skipped_to_json`; removes secrets. Raises TypeError or ValueError."""
    fields = checked("skipped", fields, dict)
    return {
        kind: {
            cause: _read_tally(tally)
            for cause, tally in checked(f"skipped.{kind}", fields[kind], dict[str, Tally]).items()
        }
        for kind in (FILES, RECORDS, PARTS)
        if kind in fields
    }


def _read_tally(tally: Tally) -> Tally:
    require_within("count", tally.count, 1, INT64_MAX)
    require_within("first places", len(tally.first), 1, max(_MAX_FIRST.values()))
    return Tally(tally.count, tuple(map(scrub, tally.first)))


def num_skipped(skipped: Skipped, kind: str) -> int:
    return sum(tally.count for tally in skipped.get(kind, {}).values())


def skipped_lines(skipped: Skipped) -> list[str]:
    """One line per cause, the most frequent of each kind first, for display."""
    return [
        with_options(
            f"{tally.count:,} {_NOUNS[kind][tally.count > 1]} skipped: {cause} ({_places(tally)})"
        )
        for kind in skipped
        for cause, tally in _by_count(skipped[kind])
    ]


def why_records_are_bad(skipped: Skipped) -> str:
    """Counts of bad records by cause, with the first record of the most frequent one."""
    causes = _by_count(skipped.get(RECORDS, {}))
    if not causes:
        return ""
    counted = ", ".join(f"{tally.count:,} x {cause}" for cause, tally in causes)
    return f"{counted}; the first: {causes[0][1].first[0]}"


def _add(skipped: Skipped, kind: str, cause: str, tally: Tally) -> None:
    causes = skipped.setdefault(kind, {})
    before = causes.get(cause)
    causes[cause] = tally if before is None else before.plus(tally, _MAX_FIRST[kind])


def _by_count(causes: Mapping[str, Tally]) -> list[tuple[str, Tally]]:
    return sorted(causes.items(), key=lambda item: (-item[1].count, item[0]))


def _places(tally: Tally) -> str:
    return ", ".join(tally.first) + (", ..." if tally.count > len(tally.first) else "")
