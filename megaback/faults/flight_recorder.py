"""Dump of torch's flight recorder of collectives, bounded in time, by a rank that loses the others.

torch records the last collectives of each backend: gloo's in `_dump_fr_trace_json`, NCCL's in
`_dump_nccl_trace_json`, which builds without CUDA do not have. Only these JSON forms are used: the
others are pickles.
"""

import json
import signal
import sys
import threading
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from megaback.faults.collective_record import CollectiveRecord, record_of

_DUMPS = ("_dump_nccl_trace_json", "_dump_fr_trace_json")
MAX_DUMP_S = 5.0
_ALARM_RATIO = 6
"""Time until the alarm, in units of MAX_DUMP_S: a process that gets no CPU must not end by it."""
_MAX_ENTRIES = 500
"""Maximum number of entries in a file; torch's buffer may be larger."""

Dump = tuple[CollectiveRecord, list[dict[str, Any]]]


def dump_collectives(**facts: Any) -> Dump | None:
    """This rank's record and the newest entries behind it; None if there are none in time.

    `facts`: rank, world size and start of the record. CUDA may block the dump for ever, and the
    interpreter with it; then SIGALRM ends the process.
    """
    found: list[Dump] = []

    def work() -> None:
        with suppress(Exception):  # the format is torch's own
            entries, groups = _entries()
            if entries:
                place = _place_of_main_thread()
                record = record_of(entries, groups, time=time.time(), place=place, **facts)
                found.append((record, entries[-_MAX_ENTRIES:]))

    thread = threading.Thread(target=work, name="flight recorder", daemon=True)
    signal.setitimer(signal.ITIMER_REAL, _ALARM_RATIO * MAX_DUMP_S)
    try:
        thread.start()
        thread.join(MAX_DUMP_S)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
    return found[0] if found else None


def _entries() -> tuple[list[dict[str, Any]], dict[str, tuple[int, ...]]]:
    """The recorded entries of all backends, oldest first, and the ranks of known groups."""
    entries: dict[tuple[Any, ...], dict[str, Any]] = {}
    groups: dict[str, tuple[int, ...]] = {}
    for name in _DUMPS:
        dump = getattr(torch._C._distributed_c10d, name, None)
        if dump is None:
            continue
        fields = json.loads(dump())
        for entry in fields["entries"]:  # of a backend that is in both, once
            key = (*entry["process_group"], entry["op_id"], entry["is_p2p"], entry["p2p_seq_id"])
            entries[key] = entry
        for group in fields["pg_config"].values():
            ranks = json.loads(group["ranks"])
            if ranks:
                groups[f"{group['name']} ({group['desc']})"] = tuple(ranks)
    return sorted(entries.values(), key=lambda entry: entry["time_created_ns"]), groups


def _place_of_main_thread() -> str:
    """Function and line that the main thread executes, and those of this package below it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None:
        return "at an unknown place"
    stack = traceback.extract_stack(frame)
    package = f"{Path(__file__).parents[1]}/"
    ours = [one for one in stack if one.filename.startswith(package)]
    shown = [stack[-1], *(one for one in ours[-1:] if one is not stack[-1])]
    return "in " + ", called by ".join(
        f"{one.name} of {'/'.join(Path(one.filename).parts[-3:])}:{one.lineno}" for one in shown
    )
