"""A minimum number of documents in the val set of a small data set.

The hash of a text decides its split: hashes below the val fraction are the val set. Where that
gives fewer than ten documents, or less than a tenth of fewer than a hundred, the fraction is raised
to just above the lowest hashes of the train set, and the tasks that hold these are run again. The
split still depends on the text alone: equal texts are never in both, and neither workers nor
restarts change a byte.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.build.plan import Task
from data_pipeline.build.selection import choose_documents
from data_pipeline.build.task import TaskRecord, finished_record, read_notes, run_task
from data_pipeline.build.val_hashes import KEY_BITS, MIN_VAL_DOCUMENTS, NOTE_SHIFT
from data_pipeline.common.process_pool import run_in_processes
from data_pipeline.shards.manifest import SPLITS

_MIN_DOCUMENTS_PER_VAL = 10
_TRAIN, _VAL = (SPLITS.index(name) for name in ("train", "val"))


def with_val_minimum(
    tasks: Sequence[Task],
    records: Sequence[TaskRecord],
    num_planned: int,
    out: Path,
    model_bytes: bytes,
    workers: int,
) -> tuple[list[Task], list[TaskRecord]]:
    """The tasks that give the val set its minimum, and their records; unchanged if they already do.

    A task that is run again has a new index, from `num_planned` on, so that no file is overwritten
    that another process may be reading. Raises the errors of `run_task`.
    """
    settings = tasks[0].settings
    if settings.val_fraction <= 0:
        return list(tasks), list(records)
    if settings.selects:
        num_val, of_tasks = _kept_hashes(tasks, out)
        num_documents = num_val + sum(sum(hashes.values()) for hashes in of_tasks)
    else:
        num_val = sum(s.documents for record in records for s in record.shards if s.split == "val")
        num_documents = sum(record.documents for record in records)
        of_tasks = [Counter(dict(record.lowest_hashes)) for record in records]
    last = _last_hash(sum(of_tasks, Counter()), num_val, num_documents)
    if last is None:
        return list(tasks), list(records)
    # As a float, the hash of a text may be rounded up to the next representable fraction.
    stop = last + 2
    raised = replace(settings, val_fraction=stop / 2.0**KEY_BITS)
    changed = {
        number: replace(tasks[number], index=num_planned + tasks[number].index, settings=raised)
        for number, hashes in enumerate(of_tasks)
        if hashes and min(hashes) < stop
    }
    done = {number: finished_record(task, out) for number, task in changed.items()}
    waiting = [number for number, record in done.items() if record is None]
    calls = [(changed[number], out, model_bytes) for number in waiting]
    for call, record in run_in_processes(run_task, calls, workers):
        done[waiting[call]] = record
    return (
        [changed.get(number, task) for number, task in enumerate(tasks)],
        [done.get(number) or record for number, record in enumerate(records)],
    )


def _last_hash(hashes: Counter[int], num_val: int, num_documents: int) -> int | None:
    """The highest hash to move to the val set; None if it needs none."""
    wanted = min(MIN_VAL_DOCUMENTS, num_documents // _MIN_DOCUMENTS_PER_VAL)
    last = None
    for key in sorted(hashes):
        # Equal texts move together: one that makes up most of a data set stays in the train set.
        if num_val >= wanted or num_val + hashes[key] > num_documents // 2:
            break
        num_val += hashes[key]
        last = key
    return last


def _kept_hashes(tasks: Sequence[Task], out: Path) -> tuple[int, list[Counter[int]]]:
    """Number of kept documents in the val set, and the hashes of the other kept ones.

    The hashes are by task, each with its number of documents.
    """
    num_val = 0
    of_tasks = []
    for task, (keep, _) in zip(tasks, choose_documents(tasks, out), strict=True):
        notes = read_notes(task, out)
        num_val += int(np.sum(keep & (notes["split"] == _VAL)))
        high = notes["high"][keep & (notes["split"] == _TRAIN)]
        keys, numbers = np.unique(high >> np.uint64(NOTE_SHIFT), return_counts=True)
        of_tasks.append(Counter(dict(zip(keys.tolist(), numbers.tolist(), strict=True))))
    return num_val, of_tasks
