"""Records of how a run ended, for users and scripts: `exit.json` and `history.jsonl`.

`exit.json` describes the newest start: it is removed when the run starts again, and written by the
first process that has a reason. `history.jsonl` has a line per start and per end.
"""

import json
import os
import socket
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import parse_json, read_json
from data_pipeline.common.regular_files import open_in_place, read_file
from megaback.environment import slurm_job
from megaback.faults.run_records import MAX_RECORD_BYTES, Fields, last_lines
from megaback.run_folder import BAD_NODES_NAME, EXIT_NAME, HISTORY_NAME

START_EVENT = "start"
_MAX_HISTORY_BYTES = 1 << 21
"""About 8,000 events: a longer history may be untrusted, and older events are not needed."""
_FIELDS = Fields(
    counts=frozenset(("step", "total_steps", "world_size", "zero_stage", "code", "restarts")),
    numbers=frozenset(("rank",)),
    texts=frozenset(("event", "host", "job", "kind", "reason", "start")),
    times=frozenset(("time",)),
)


def record_start(run: Path, **fields: Any) -> None:
    """Record the start of a run. Raises OSError."""
    (run / EXIT_NAME).unlink(missing_ok=True)
    _append(run, {"event": "start", **fields})


def record_event(run: Path, event: str, **fields: Any) -> None:
    """Append another event to a run's history. Raises OSError."""
    _append(run, {"event": event, **fields})


def record_exit(
    run: Path,
    code: int,
    kind: str,
    reason: str,
    rank: int | None = None,
    start: str | None = None,
) -> bool:
    """Record why a start of a run ends; False if another process already has.

    Ignores failed writes.
    """
    fields = {"code": code, "kind": kind, "reason": reason, "rank": rank, "start": start}
    fields |= _here()
    path = run / EXIT_NAME
    try:
        with path.open("x", encoding="utf-8") as file:
            try:
                file.write(json.dumps(fields, indent=2) + "\n")
                file.flush()
            except OSError:
                path.unlink(missing_ok=True)
                raise
    except FileExistsError:
        return False
    except OSError:
        pass
    with suppress(OSError):
        _append(run, {"event": "exit", **fields})
    return True


def read_exit(run: Path) -> dict[str, Any] | None:
    """The record of a run's end; None while it runs, or if no process could write it.

    A record that no version of megaback writes is ignored.
    """
    try:
        fields = read_json(run / EXIT_NAME, MAX_RECORD_BYTES)
    except (OSError, ValueError):
        return None
    is_record = isinstance(fields, dict) and _FIELDS.problem(fields) is None
    return fields if is_record and type(fields.get("code")) is int else None


def read_history(run: Path) -> list[dict[str, Any]]:
    """The last starts and ends, thousands of them, oldest first.

    Truncated lines, and lines that no version of megaback writes, are skipped.
    """
    lines = []
    with suppress(OSError):
        for line in last_lines(run / HISTORY_NAME, _MAX_HISTORY_BYTES):
            try:
                fields = parse_json(line)
            except ValueError:
                continue
            if isinstance(fields, dict) and _FIELDS.problem(fields) is None:
                lines.append(fields)
    return lines


def newest_start(run: Path) -> dict[str, Any] | None:
    """The record of a run's newest start, if there is one."""
    starts = [line for line in read_history(run) if line.get("event") == START_EVENT]
    return starts[-1] if starts else None


def read_bad_nodes(run: Path) -> list[str]:
    """Nodes that prevented a start. Raises OSError, ValueError."""
    return read_file(run / BAD_NODES_NAME, MAX_RECORD_BYTES).decode().split()


def _append(run: Path, fields: dict[str, Any]) -> None:
    line = json.dumps({**fields, **_here()}) + "\n"
    with open_in_place(run / HISTORY_NAME, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":  # the last line was truncated by a kill
                line = "\n" + line
        file.write(line.encode())


def _here() -> dict[str, Any]:
    return {
        "time": time.time(),
        "host": socket.gethostname(),
        "job": slurm_job()[0],
    }
