"""Record of a rank's last collectives, which it writes as it loses the others; loads no torch.

`collectives/rank-00000.jsonl` of the run's folder has two lines: this record, and the entries of
torch's flight recorder that it was made from. Together, the records of the ranks show in which
collective a run hung, and which ranks never entered it.
"""

import json
import os
from collections.abc import Callable, Collection, Iterable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import made_from, parse_json, require_within
from data_pipeline.common.number_ranges import INT64_MAX, MANY
from data_pipeline.common.regular_files import open_in_place
from megaback.faults.run_records import Fields, lines_of
from megaback.run_folder import collectives_path, collectives_paths

_MAX_BYTES = 1 << 20
_MAX_WAITING = 100
_SHOWN_RANKS = 4
_FIELDS = Fields(times=frozenset(("time", "since")))


@dataclass(frozen=True)
class Collective:
    """A collective that a rank has entered."""

    group: str
    """Name of its process group."""
    number: int
    """Number in its group, the same on all ranks."""
    operation: str
    since: float
    """Time at which the rank entered it, in seconds since the epoch, by its host's clock."""

    @property
    def name(self) -> str:
        return f"{self.operation} (number {self.number:,} of group {self.group})"


@dataclass(frozen=True, kw_only=True)
class CollectiveRecord:
    """Collectives of a rank as it ends."""

    rank: int
    world_size: int
    start: str | None
    """ID of the start that it belongs to."""
    time: float
    """Time of the record, in seconds since the epoch."""
    place: str
    """Function and line that the main thread executes."""
    entered: dict[str, int]
    """Number of the last collective that the rank has entered, by group."""
    waiting: tuple[Collective, ...]
    """Collectives that it has entered and that are not done, in the order of entering."""
    groups: dict[str, tuple[int, ...]]
    """Ranks of the groups, as far as they are known; a group that is missing has all ranks."""


def record_of(
    entries: Iterable[dict[str, Any]], groups: dict[str, tuple[int, ...]], **facts: Any
) -> CollectiveRecord:
    """A record made from the entries of torch's flight recorder, oldest first."""
    entered: dict[str, int] = {}
    waiting: list[Collective] = []
    for entry in entries:
        if entry["is_p2p"]:  # not all ranks of a group enter it
            continue
        group, number = _group_name(entry["process_group"]), int(entry["collective_seq_id"])
        entered[group] = max(number, entered.get(group, 0))
        if not entry["retired"] and entry["state"] != "completed":
            operation = f"{entry['profiling_name']} of {_sizes(entry)}"
            waiting.append(Collective(group, number, operation, entry["time_created_ns"] / 1e9))
    return CollectiveRecord(
        entered=entered, waiting=tuple(waiting[:_MAX_WAITING]), groups=groups, **facts
    )


def _group_name(names: list[str]) -> str:
    """Name of a group from its number and its description."""
    number, description = names
    return number if description in ("", "undefined") else f"{number} ({description})"


def _sizes(entry: dict[str, Any]) -> str:
    parts = [
        f"{kind} {'x'.join(map(str, size)) or '1'}"
        for kind, size in zip(entry["input_dtypes"], entry["input_sizes"], strict=False)
    ]
    more = f" and {len(parts) - 2} more" if len(parts) > 2 else ""
    return (", ".join(parts[:2]) or "nothing") + more


def write_collectives(
    run: Path,
    record: CollectiveRecord,
    entries: list[dict[str, Any]],
    publish: Callable[[Path, Path], None] = os.replace,
) -> None:
    """Write a rank's record and the entries behind it; `publish` renames it. Raises OSError."""
    path = collectives_path(run, record.rank)
    path.parent.mkdir(exist_ok=True)
    partial = path.with_suffix(f".{record.start}.partial" if record.start else ".partial")
    with open_in_place(partial, "wb") as file:
        file.write(f"{json.dumps(asdict(record))}\n{json.dumps(entries)}\n".encode())
    publish(partial, path)


def read_collectives(run: Path, start: str | None) -> list[CollectiveRecord]:
    """The records of a start, by rank; invalid files are skipped."""
    found = []
    for path in collectives_paths(run):
        with suppress(OSError, ValueError, TypeError):
            record = made_from(CollectiveRecord, parse_json(next(lines_of(path, _MAX_BYTES), b"")))
            require_within("world_size", record.world_size, 1, int(MANY.max))
            require_within("rank", record.rank, 0, record.world_size - 1)
            numbers = [*record.entered.values(), *(one.number for one in record.waiting)]
            require_within("number", max(numbers, default=0), 0, INT64_MAX)
            of_times = [asdict(record), *map(asdict, record.waiting)]
            if record.start == start and not any(map(_FIELDS.problem, of_times)):
                found.append(record)
    return found


def describe_hang(records: Collection[CollectiveRecord]) -> str | None:
    """The collective in which ranks waited for others, and for which; None without one.

    Of several, the one that was entered first: later ones are queued behind it.
    """
    if not records:
        return None
    known = {record.rank: record for record in records}
    world = range(max(record.world_size for record in records))
    hangs = []
    for record in records:
        for one in record.waiting:
            ranks = record.groups.get(one.group) or world
            absent = [
                rank
                for rank in ranks
                if rank in known and known[rank].entered.get(one.group, 0) < one.number
            ]
            silent = [rank for rank in ranks if rank not in known]
            has_all = not absent and not silent
            hangs.append((has_all, one.since, record.rank, one, absent, silent))
    if not hangs:
        return None
    _, since, _, one, absent, silent = min(hangs, key=lambda hang: hang[:3])
    inside = [
        record.rank
        for record in records
        if any((own.group, own.number) == (one.group, one.number) for own in record.waiting)
    ]
    text = f"{_named(inside)} waited in {one.name} for {known[inside[0]].time - since:.0f} s"
    if absent:
        verb = "has" if len(absent) == 1 else "have"
        text += f", which {_named(absent)} {verb} not entered ({known[absent[0]].place})"
    if silent:
        text += f"; {_named(silent)} left no record"
    return text if absent or silent else f"{text}, which all ranks have entered"


def _named(ranks: list[int]) -> str:
    shown = ", ".join(map(str, ranks[:_SHOWN_RANKS]))
    more = f" and {len(ranks) - _SHOWN_RANKS:,} more" if len(ranks) > _SHOWN_RANKS else ""
    return f"rank{'s' * (len(ranks) > 1)} {shown}{more}"
