"""De-duplication and limits: selects documents from the shards that tasks have staged.

Documents are selected in the order of the sources, whichever task read them and whenever it did,
from the notes of every task. Then each task's shards are copied without the excluded documents; no
text is encoded again.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.build.plan import BUILD_FOLDER, Task
from data_pipeline.build.settings import BuildSettings
from data_pipeline.build.task import TaskRecord, read_notes, shards_folder
from data_pipeline.common.atomic import partial_name, replacing
from data_pipeline.shards.compression import Compression
from data_pipeline.shards.manifest import SPLITS, ShardEntry
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.codec import TextFormat

_PASS_DOCUMENTS = 16 << 20  # hashes compared at once: 24 bytes each, and as much to sort them

Keep = npt.NDArray[np.bool_]


def tasks_within_limits(settings: BuildSettings, records: Sequence[TaskRecord | None]) -> int:
    """Number of leading tasks that hold every document within the limits.

    All of them with de-duplication, which may exclude documents of the first ones. `records` has
    None for tasks that are not done; these are needed unless the tasks before them suffice.
    """
    if settings.deduplicate or not settings.is_limited:
        return len(records)
    documents = tokens = 0
    for index, record in enumerate(records):
        if (settings.limit_documents is not None and documents >= settings.limit_documents) or (
            settings.limit_tokens is not None and tokens >= settings.limit_tokens
        ):
            return index
        if record is None:
            break
        documents += record.documents
        tokens += record.tokens
    return len(records)


def choose_documents(tasks: Sequence[Task], out: Path) -> list[tuple[Keep, dict[str, int]]]:
    """Documents that each task keeps, and the number of duplicates that it excludes.

    Documents past the limits are not counted, as some are never read.
    """
    settings = tasks[0].settings
    notes = [read_notes(task, out) for task in tasks]
    keeps = [np.ones(len(of_task), dtype=np.bool_) for of_task in notes]
    if settings.deduplicate:
        _exclude_duplicates(notes, keeps)
    duplicates = [int(len(keep) - keep.sum()) for keep in keeps]
    documents_left = settings.limit_documents
    tokens_left = settings.limit_tokens
    chosen: list[tuple[Keep, dict[str, int]]] = []
    for of_task, keep, num_duplicates in zip(notes, keeps, duplicates, strict=True):
        if documents_left == 0:
            chosen.append((np.zeros_like(keep), {}))
            continue
        kept = np.flatnonzero(keep)
        number = len(kept)
        if documents_left is not None:
            number = min(number, documents_left)
        if tokens_left is not None:
            cumulative = np.cumsum(of_task["tokens"][kept], dtype=np.int64)
            number = min(number, int(np.searchsorted(cumulative, tokens_left, side="right")))
        if number < len(kept):
            keep[kept[number:]] = False
            num_duplicates = int(np.sum(~keep[: kept[number]]))
            documents_left = 0
        elif documents_left is not None:
            documents_left -= number
        if tokens_left is not None:
            tokens_left -= int(of_task["tokens"][kept[:number]].sum(dtype=np.int64))
        chosen.append((keep, {"duplicate": num_duplicates} if num_duplicates else {}))
    return chosen


def _exclude_duplicates(notes: Sequence[npt.NDArray[Any]], keeps: Sequence[Keep]) -> None:
    """Keep the first of equal texts, compared by 128 bits of their SHA-256.

    Hashes are compared in several passes, each of bounded memory.
    """
    num_documents = sum(len(of_task) for of_task in notes)
    num_passes = -(-num_documents // _PASS_DOCUMENTS)
    first_document = np.concatenate([[0], np.cumsum([len(of_task) for of_task in notes])])
    for pass_number in range(num_passes):
        highs, lows, documents = [], [], []
        for start, of_task in zip(first_document[:-1], notes, strict=True):
            high = of_task["high"]
            mine = np.flatnonzero(high % np.uint64(num_passes) == pass_number)
            highs.append(high[mine])
            lows.append(of_task["low"][mine])
            documents.append(start + mine)
        high, low, document = map(np.concatenate, (highs, lows, documents))
        by_hash = np.lexsort((document, low, high))
        high, low, document = high[by_hash], low[by_hash], document[by_hash]
        again = document[1:][(high[1:] == high[:-1]) & (low[1:] == low[:-1])]
        task = np.searchsorted(first_document, again, side="right") - 1
        for index in np.unique(task):
            keeps[index][again[task == index] - first_document[index]] = False


def selected_record_path(out: Path, index: int) -> Path:
    return out / BUILD_FOLDER / f"selected-{index:05d}.json"


def write_selection(
    task: Task, record: TaskRecord, keep: Keep, excluded: dict[str, int], out: Path
) -> TaskRecord:
    """Copy a task's staged shards to `out`, without the excluded documents.

    Raises ShardCorruptError for a staged shard that is damaged, and OSError.
    """
    sha256 = hashlib.sha256(task.sha256.encode() + np.packbits(keep).tobytes()).hexdigest()
    path = selected_record_path(out, task.index)
    if done := TaskRecord.load(path, sha256, out):
        return done
    notes = read_notes(task, out)
    staged = shards_folder(task, out)
    shards: list[ShardEntry] = []
    for split_number, split in enumerate(SPLITS):
        in_split = np.flatnonzero(notes["split"] == split_number)
        start = 0
        for shard in (shard for shard in record.shards if shard.split == split):
            documents = in_split[start : start + shard.documents]
            start += shard.documents
            if keep[documents].all():
                _link(staged / shard.file, out / shard.file)
                shards.append(shard)
            elif keep[documents].any():
                text_bytes = notes["text_bytes"][documents]
                shards.append(_copy_shard(shard, staged, out, keep[documents], text_bytes, task))
    counted = Counter(record.excluded) + Counter(excluded)
    selected = TaskRecord(sha256, tuple(shards), dict(sorted(counted.items())), record.skipped)
    selected.save(path)
    return selected


def _copy_shard(
    shard: ShardEntry,
    staged: Path,
    out: Path,
    keep: Keep,
    text_bytes: npt.NDArray[np.uint32],
    task: Task,
) -> ShardEntry:
    compression = Compression(level=task.settings.compression_level)
    with ShardReader(staged / shard.file) as reader, replacing(out / shard.file) as file:
        header = reader.header
        text_format = TextFormat.from_dict(asdict(header)).to_dict()
        writer = ShardWriter(file, text_format, reader.id_dtype, header.frame_tokens, compression)
        for ids, kept, num_bytes in zip(reader.documents(), keep, text_bytes, strict=True):
            if kept:
                writer.add(ids, int(num_bytes))
        digest = writer.finish()
    return ShardEntry(shard.file, shard.split, **asdict(digest))


def _link(source: Path, target: Path) -> None:
    """Hard-link a file, or copy it where the file system has no links."""
    if target.exists() and target.samefile(source):
        return
    draft = target.with_name(partial_name(target.name))
    try:
        os.link(source, draft)
    except OSError:
        with source.open("rb") as original, replacing(target) as file:
            while block := original.read(1 << 20):
                file.write(block)
    else:
        os.replace(draft, target)
        draft.unlink(missing_ok=True)  # still there if another process linked the same file
