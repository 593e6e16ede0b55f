"""The unit of building: one task reads some slices of the source and writes their shards.

A task is a pure function of its slices and of the settings, so that it gives the same bytes on any
machine, in any order, at any time. Its completion record is written last; a task without a valid
record is done again.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from data_pipeline.command import replacing, write_text
from data_pipeline.manifest import SPLITS, ShardEntry
from data_pipeline.shard_format import DEFAULT_FRAME_TOKENS, ShardWriter
from data_pipeline.sources import Slice, read_slice
from data_pipeline.text import Direction, TextCodec, Unit

BUILD_FOLDER = ".build"

_SMALLEST_TASK_BYTES = 2 << 20
_LARGEST_TASK_BYTES = 1 << 30
_AIMED_TASKS = 64


@dataclass(frozen=True)
class BuildSettings:
    """What decides the bytes of the shards, besides the source's text and the tokenizer's model."""

    source: str
    tokenizer_sha256: str
    direction: str = Direction.BACKWARD.value
    unit: str = Unit.TOKEN.value
    val_fraction: float = 0.01
    frame_tokens: int = DEFAULT_FRAME_TOKENS
    shard_tokens: int = 1 << 26
    compression_level: int = 3
    text_column: str = "text"


@dataclass(frozen=True)
class Task:
    """Slices that one process reads, one after another."""

    index: int
    slices: tuple[Slice, ...]
    settings: BuildSettings

    @property
    def sha256(self) -> str:
        """Names the task's result: equal tasks write equal bytes.

        The slices say what is read; how the source was spelled does not matter.
        """
        fields = asdict(replace(self, settings=replace(self.settings, source="")))
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()


@dataclass(frozen=True)
class TaskRecord:
    """What a finished task wrote."""

    task_sha256: str
    shards: tuple[ShardEntry, ...]
    empty_documents: int

    def save(self, folder: Path, index: int) -> None:
        write_text(_record_path(folder, index), json.dumps(asdict(self), indent=1) + "\n")


def cut_into_tasks(slices: tuple[Slice, ...], settings: BuildSettings) -> tuple[Task, ...]:
    """Group neighbouring slices into about 64 tasks of 2 MiB to 1 GiB of input each.

    Depends on the source alone, never on the number of workers. A slice of unknown size is a task
    of its own.
    """
    total_bytes = sum(piece.size_bytes for piece in slices)
    task_bytes = min(max(total_bytes // _AIMED_TASKS, _SMALLEST_TASK_BYTES), _LARGEST_TASK_BYTES)
    groups: list[list[Slice]] = []
    filled_bytes = task_bytes
    for piece in slices:
        size_bytes = piece.size_bytes or task_bytes
        if filled_bytes + size_bytes > task_bytes:
            groups.append([])
            filled_bytes = 0
        groups[-1].append(piece)
        filled_bytes += size_bytes
    return tuple(Task(index, tuple(group), settings) for index, group in enumerate(groups))


def finished_record(task: Task, folder: Path) -> TaskRecord | None:
    """The record of a task that is done and whose files have the recorded sizes, else None."""
    try:
        fields = json.loads(_record_path(folder, task.index).read_text(encoding="utf-8"))
        record = TaskRecord(
            fields["task_sha256"],
            tuple(ShardEntry(**entry) for entry in fields["shards"]),
            fields["empty_documents"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if record.task_sha256 != task.sha256:
        return None
    for shard in record.shards:
        path = folder / shard.file
        if not path.is_file() or path.stat().st_size != shard.file_bytes:
            return None
    return record


def run_task(task: Task, folder: Path, model_bytes: bytes) -> TaskRecord:
    """Read, encode and write one task. Raises the errors of its source, and OSError."""
    settings = task.settings
    codec = _codec(model_bytes, settings.direction, settings.unit)
    empty_documents = 0
    shards: list[ShardEntry] = []
    with ExitStack() as stack:
        outputs = {
            split: stack.enter_context(_SplitOutput(split, task, folder, codec, shards))
            for split in SPLITS
        }
        for text in _texts(task):
            if not text:
                empty_documents += 1
                continue
            text_utf8 = text.encode("utf-8", "surrogatepass")
            split = "val" if belongs_to_val(text_utf8, settings.val_fraction) else "train"
            outputs[split].add(text, len(text_utf8))
    record = TaskRecord(
        task.sha256, tuple(sorted(shards, key=lambda shard: shard.file)), empty_documents
    )
    record.save(folder, task.index)
    return record


def belongs_to_val(text_utf8: bytes, val_fraction: float) -> bool:
    """Decide the split by the text alone, so that equal texts never lie in both."""
    draw = int.from_bytes(hashlib.sha256(text_utf8).digest()[:8], "big")
    return draw < val_fraction * 2.0**64


class _SplitOutput:
    """The shards that one task writes for one split, opened as documents come."""

    def __init__(
        self, split: str, task: Task, folder: Path, codec: TextCodec, shards: list[ShardEntry]
    ) -> None:
        self._split = split
        self._task = task
        self._folder = folder
        self._codec = codec
        self._shards = shards
        self._num_shards = 0
        self._open_file = ExitStack()
        self._writer: ShardWriter | None = None

    def __enter__(self) -> "_SplitOutput":
        return self

    def __exit__(self, *error: Any) -> None:
        if error[0] is None:
            self._close_shard()
        else:
            self._open_file.__exit__(*error)

    def add(self, text: str, text_bytes: int) -> None:
        settings = self._task.settings
        if self._writer is None:
            file = self._open_file.enter_context(replacing(self._folder / self._file_name()))
            self._writer = ShardWriter(
                file,
                self._codec.format.to_dict(),
                self._codec.id_dtype,
                settings.frame_tokens,
                settings.compression_level,
            )
        self._writer.add(self._codec.encode_document(text), text_bytes)
        if self._writer.tokens >= settings.shard_tokens:
            self._close_shard()

    def _file_name(self) -> str:
        return f"{self._split}-{self._task.index:05d}-{self._num_shards:05d}.zst"

    def _close_shard(self) -> None:
        if self._writer is None:
            return
        with self._open_file:  # the file takes its final name when this block ends
            digest = self._writer.finish()
        self._shards.append(ShardEntry(self._file_name(), self._split, **asdict(digest)))
        self._num_shards += 1
        self._writer = None


def _texts(task: Task) -> Iterator[str]:
    for piece in task.slices:
        for document in read_slice(piece, text_column=task.settings.text_column):
            yield document.text


@lru_cache(maxsize=1)
def _codec(model_bytes: bytes, direction: str, unit: str) -> TextCodec:
    return TextCodec(model_bytes, Direction(direction), Unit(unit))


def _record_path(folder: Path, index: int) -> Path:
    return folder / BUILD_FOLDER / f"task-{index:05d}.json"


def same_source(left: BuildSettings, right: BuildSettings) -> bool:
    """Whether two builds read the same, one perhaps by a relative path."""
    return (
        left.source == right.source or Path(left.source).resolve() == Path(right.source).resolve()
    )


def same_but_source(left: BuildSettings, right: BuildSettings) -> bool:
    """Whether two builds differ at most in what they read."""
    return replace(left, source="") == replace(right, source="")
