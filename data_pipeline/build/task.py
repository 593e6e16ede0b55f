"""Build task: reads some portions of the sources and writes their shards.

A task is a pure function of its portions and of the settings: it gives the same bytes on any
machine, in any order, at any time. Its completion record is written last; a task without a valid
record is run again. Two processes may run the same task: both write the same bytes.

With de-duplication or limits, the documents that a task keeps depend on other tasks. It then stages
its shards, with notes of each document, from which `selection.py` selects.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.build.plan import BUILD_FOLDER, STAGED_FOLDER, Task
from data_pipeline.build.progress import Counts, no_counts
from data_pipeline.build.round_trip import RoundTrip
from data_pipeline.build.task_input import (
    BAD_RECORD,
    TOO_LONG,
    Excluded,
    Passed,
    belongs_to_val,
    excluded_by,
    read_task,
)
from data_pipeline.build.task_output import (
    DOCUMENT_NOTE,
    Encoded,
    EncodedDocument,
    Notes,
    SplitOutput,
)
from data_pipeline.build.val_hashes import KEY_BITS, LowestHashes
from data_pipeline.common.atomic import replacing, write_text
from data_pipeline.common.checked_json import checked, read_json, require_within
from data_pipeline.common.file_names import path_within
from data_pipeline.shards.examples import PackedExample
from data_pipeline.shards.manifest import SPLITS, ShardEntry
from data_pipeline.sources.skipped import Skipped, merged, skipped_from_json
from data_pipeline.text.chat_format import ChatFormat, Example
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.encoder import BATCH_CHARACTERS

_HASHES = tuple[tuple[int, int], ...]
_TRAIN = SPLITS.index("train")


@dataclass(frozen=True)
class TaskRecord:
    """Completion record: the shards that a finished task wrote, and its counts."""

    task_sha256: str
    shards: tuple[ShardEntry, ...]
    excluded: dict[str, int]
    skipped: Skipped = field(default_factory=dict)
    """Malformed records and skipped parts of records, by cause."""
    lowest_hashes: _HASHES = ()
    """The lowest hashes of documents in the train set, each with its number of documents."""

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    def save(self, path: Path) -> None:
        write_text(path, json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, path: Path, sha256: str, folder: Path) -> "TaskRecord | None":
        """The record, if of this hash and its shards in `folder` have their sizes, else None."""
        try:
            fields = read_json(path)
            record = cls(
                checked("task_sha256", fields["task_sha256"], str),
                tuple(map(ShardEntry.from_json, fields["shards"])),
                checked("excluded", fields["excluded"], dict[str, int]),
                skipped_from_json(fields.get("skipped", {})),
                checked("lowest_hashes", fields.get("lowest_hashes", ()), _HASHES),
            )
            for key, number in record.lowest_hashes:
                require_within("a hash", key, 0, (1 << KEY_BITS) - 1)
                require_within("documents with a hash", number, 1, record.documents)
            task = path.stem.rpartition("-")[2]
            if any(shard.file.split("-")[1] != task for shard in record.shards):
                raise ValueError("it lists shards of another task")
            if len({shard.file for shard in record.shards}) < len(record.shards):
                raise ValueError("it lists a shard twice")
            whole = record.task_sha256 == sha256 and all(
                (file := path_within(folder, shard.file)).is_file()
                and file.stat().st_size == shard.file_bytes
                for shard in record.shards
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None
        return record if whole else None


def record_path(out: Path, index: int) -> Path:
    return out / BUILD_FOLDER / f"task-{index:05d}.json"


def shards_folder(task: Task, out: Path) -> Path:
    """The folder of a task's shards: hidden while documents of them may still be excluded."""
    return out / STAGED_FOLDER if task.settings.selects else out


def notes_path(task: Task, out: Path) -> Path:
    return shards_folder(task, out) / f"task-{task.index:05d}.documents"


def finished_record(task: Task, out: Path) -> TaskRecord | None:
    """The record of a task that is done and whose files are there, else None.

    A task that skipped malformed records is not done if `on_bad_record` is now `stop`.
    """
    settings = task.settings
    record = TaskRecord.load(record_path(out, task.index), task.sha256, shards_folder(task, out))
    if record is None or (settings.selects and not _has_notes(task, record, out)):
        return None
    return None if settings.on_bad_record == "stop" and record.excluded.get(BAD_RECORD) else record


def read_notes(task: Task, out: Path) -> npt.NDArray[Any]:
    """Notes of a task's documents, in order: dtype DOCUMENT_NOTE, shape (documents,)."""
    path = notes_path(task, out)
    if path.stat().st_size == 0:
        return np.empty(0, dtype=DOCUMENT_NOTE)
    return np.memmap(path, dtype=DOCUMENT_NOTE, mode="r")


def _has_notes(task: Task, record: TaskRecord, out: Path) -> bool:
    """Whether a task has notes of as many documents per split as its record counts."""
    path = notes_path(task, out)
    if not path.is_file() or path.stat().st_size != record.documents * DOCUMENT_NOTE.itemsize:
        return False
    counted = np.bincount(read_notes(task, out)["split"], minlength=len(SPLITS))
    promised = [
        sum(shard.documents for shard in record.shards if shard.split == split) for split in SPLITS
    ]
    return bool(np.array_equal(counted, promised))


def run_task(task: Task, out: Path, model_bytes: bytes, counts: Counts | None = None) -> TaskRecord:
    """Read, encode and write one task. Raises the errors of its sources, and OSError.

    `counts` is updated on the way.
    """
    counts = no_counts() if counts is None else counts
    counts[:] = 0
    try:
        return _write_task(task, out, model_bytes, counts)
    except FileNotFoundError:
        # Another process ran the same task meanwhile, and the build is finished and cleaned up.
        if record := finished_record(task, out):
            return record
        raise


def _write_task(task: Task, out: Path, model_bytes: bytes, counts: Counts) -> TaskRecord:
    settings = task.settings
    codec = _codec(model_bytes, settings.direction, settings.unit)
    folder = shards_folder(task, out)
    folder.mkdir(parents=True, exist_ok=True)
    excluded = Excluded()
    shards: list[ShardEntry] = []
    notes = Notes(settings) if settings.selects else None
    lowest = LowestHashes()
    round_trip = RoundTrip(codec)
    with ExitStack() as stack:
        outputs = [
            stack.enter_context(SplitOutput(split, task, folder, codec, shards)) for split in SPLITS
        ]
        for item in _encoded(read_task(task, counts, codec), codec, settings.row_tokens):
            if isinstance(item, Excluded):
                excluded.add(item)
                continue
            document, encoded = item
            split = document.split
            if split is None:
                split = int(belongs_to_val(document.sha256, settings.val_fraction))
            outputs[split].add(encoded)
            if document.ids is not None:
                round_trip.add(SPLITS[split], document.ids)
            if split == _TRAIN:
                lowest.add(document.sha256[:8])
            counts += (1, document.num_bytes, len(encoded.ids), 0)
            if notes and notes.add(split, len(encoded.ids), document):
                break
        for output in outputs:
            output.finish()
    round_trip.verify(folder, shards)
    if notes:
        with replacing(notes_path(task, out)) as file:
            file.write(notes.packed)
    by_file = sorted(shards, key=lambda shard: shard.file)
    counted = dict(sorted(excluded.counts.items()))
    record = TaskRecord(
        *(task.sha256, tuple(by_file), counted, merged([excluded.skipped])),
        lowest.counted(),
    )
    record.save(record_path(out, task.index))
    return record


def _encoded(
    items: Iterator[Passed | Excluded], codec: TextCodec, row_tokens: int | None
) -> Iterator[tuple[Passed, Encoded] | Excluded]:
    """The items, documents with their ids; many are encoded at once."""
    while batch := _next_batch(items):
        passed = [item for item in batch if isinstance(item, Passed)]
        encode = _encode_documents if row_tokens is None else _encode_examples
        encoded = iter(encode(passed, codec))
        for item in batch:
            if isinstance(item, Excluded):
                yield item
                continue
            of_item = next(encoded)
            is_too_long = row_tokens is not None and len(of_item.ids) > row_tokens
            yield excluded_by(TOO_LONG, item.position) if is_too_long else (item, of_item)


def _encode_documents(passed: Sequence[Passed], codec: TextCodec) -> Iterator[Encoded]:
    texts = [document.text for document in passed if document.ids is None]
    encoded = iter(codec.encode_documents(texts))
    for document in passed:
        ids = next(encoded) if document.ids is None else codec.document_of(document.ids)
        yield EncodedDocument(ids, document.num_bytes)


def _encode_examples(passed: Sequence[Passed], codec: TextCodec) -> Iterator[Encoded]:
    examples = [Example(document.text, document.response or "") for document in passed]
    encoded = ChatFormat(codec).encode_all(examples)
    for document, example in zip(passed, encoded, strict=True):
        num_loss_tokens = len(example.ids) - example.num_given
        text_bytes = document.num_bytes - 1  # without the NUL between instruction and response
        yield PackedExample(example.ids, example.num_given, num_loss_tokens, text_bytes)


def _next_batch(items: Iterator[Passed | Excluded]) -> list[Passed | Excluded]:
    batch = []
    num_characters = 0
    for item in items:
        batch.append(item)
        if isinstance(item, Excluded):
            num_characters += 1
        else:
            of_ids = 0 if item.ids is None else item.num_bytes
            num_characters += len(item.text) + len(item.response or "") + of_ids
        if num_characters >= BATCH_CHARACTERS:
            break
    return batch


@lru_cache(maxsize=1)
def _codec(model_bytes: bytes, direction: str, unit: str) -> TextCodec:
    return TextCodec(model_bytes, Direction(direction), Unit(unit))
