"""Build plan: the frozen input of a build, cut into tasks.

`plan.json` lists every file with its size and the stamp of its content, and the tasks that read
them. Every builder, on any machine, reads these files: one that has changed since is an error, and
one that was added later is ignored.
"""

import hashlib
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

from data_pipeline.build.plan_files import files_of, slices_of
from data_pipeline.build.settings import BuildSettings, content_settings
from data_pipeline.common.checked_json import briefly, checked, read_json, require_within
from data_pipeline.common.limits import MAX_PLAN_BYTES
from data_pipeline.common.regular_files import require_no_link
from data_pipeline.errors import ConfigError, OutputExistsError, ShardsMissingError
from data_pipeline.sources.documents import Slice
from data_pipeline.sources.registry import Listing, list_source, require_none_shared
from data_pipeline.sources.skipped import (
    Skipped,
    merged,
    skipped_from_json,
    skipped_to_json,
)
from data_pipeline.sources.tokenized.registry import list_tokenized
from data_pipeline.sources.weighted import WeightedSource

PLAN_NAME = "plan.json"
BUILD_FOLDER = ".build"
STAGED_FOLDER = Path(BUILD_FOLDER) / "staged"
FORMAT_NAME = "megaback-plan"
FORMAT_VERSION = 2

PLAN_DRAFT = re.compile(r"plan\.json\.[0-9a-f]{1,32}")
_SMALLEST_TASK_BYTES = 2 << 20
_LARGEST_TASK_BYTES = 1 << 30
_AIMED_TASKS = 64
_MAX_PORTIONS = 1 << 24
_MAX_TASKS = 1 << 20
"""Maximum number of --tasks."""


@dataclass(frozen=True)
class Portion:
    """A slice of a source in one of its passes, and which of its documents to take."""

    piece: Slice
    pass_number: int = 0
    fraction: float = 1.0
    split: str | None = None
    """The set that its documents belong to, if their texts do not decide that."""


@dataclass(frozen=True)
class Task:
    """The portions that one process reads, in order."""

    index: int
    portions: tuple[Portion, ...]
    settings: BuildSettings

    @property
    def sha256(self) -> str:
        """Identifies the task's output: equal tasks write equal bytes."""
        fields = {
            "index": self.index,
            "settings": content_settings(self.settings),
            "portions": [
                [
                    *portion.piece.identity,
                    *(portion.pass_number, portion.fraction, portion.split),
                ]
                for portion in self.portions
            ],
        }
        return hashlib.sha256(json.dumps(fields, sort_keys=True).encode()).hexdigest()

    @property
    def input_bytes(self) -> int:
        return sum(portion.piece.size_bytes for portion in self.portions)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """The settings of a build, the slices of each of its sources, and where tasks begin."""

    settings: BuildSettings
    inputs: tuple[tuple[Slice, ...], ...]
    """The slices of each source, in the order of `settings.sources`."""
    task_portions: tuple[int, ...]
    """Number of portions of each task, in order."""
    requested_tasks: int | None
    """Requested number of tasks; None: chosen by size."""
    skipped: Skipped = field(default_factory=dict)
    """Files of the sources that are not read, by cause."""

    @property
    def portions(self) -> tuple[Portion, ...]:
        """All portions in reading order: the passes of the first source, then of the next one."""
        return tuple(
            portion
            for part, slices in zip(self.settings.sources, self.inputs, strict=True)
            for portion in _passes(part, slices)
        )

    @property
    def tasks(self) -> tuple[Task, ...]:
        portions = self.portions
        starts = [0]
        for count in self.task_portions:
            starts.append(starts[-1] + count)
        return tuple(
            Task(index, portions[start:stop], self.settings)
            for index, (start, stop) in enumerate(pairwise(starts))
        )

    @property
    def num_tasks(self) -> int:
        return len(self.task_portions)

    @property
    def input_bytes(self) -> int:
        return sum(piece.size_bytes for slices in self.inputs for piece in slices)

    def to_json(self) -> str:
        fields: dict[str, Any] = {
            "format": FORMAT_NAME,
            "version": FORMAT_VERSION,
            "settings": self.settings.to_dict(),
            "inputs": [files_of(slices) for slices in self.inputs],
            "task_portions": self.task_portions,
            "requested_tasks": self.requested_tasks,
        }
        if self.skipped:
            fields["skipped"] = skipped_to_json(self.skipped)
        return json.dumps(fields, indent=1) + "\n"

    @classmethod
    def load(cls, out: Path) -> "Plan":
        """Raises ShardsMissingError without a plan, OutputExistsError when it cannot be read."""
        require_no_links(out)
        path = out / PLAN_NAME
        try:
            fields = read_json(path, MAX_PLAN_BYTES)
            if fields["format"] != FORMAT_NAME or fields["version"] != FORMAT_VERSION:
                found = briefly([fields["format"], fields["version"]])
                raise ValueError(f"its format and version are {found}")
            plan = cls(
                settings=BuildSettings.from_dict(fields["settings"]),
                inputs=tuple(map(slices_of, checked("inputs", fields["inputs"], list))),
                task_portions=checked("task_portions", fields["task_portions"], tuple[int, ...]),
                requested_tasks=checked("requested_tasks", fields["requested_tasks"], int | None),
                skipped=skipped_from_json(fields.get("skipped", {})),
            )
            sources = zip(plan.settings.sources, plan.inputs, strict=True)
            num_portions = sum(math.ceil(part.weight) * len(pieces) for part, pieces in sources)
            if sum(plan.task_portions) != num_portions or min(plan.task_portions, default=0) < 0:
                raise ValueError("its tasks do not add up to its inputs")
            require_within("portions", num_portions, 0, _MAX_PORTIONS)
            require_within("tasks", len(plan.task_portions), 0, _MAX_TASKS)
            require_within("requested_tasks", plan.requested_tasks or 1, 1, _MAX_TASKS)
        except (FileNotFoundError, NotADirectoryError):
            raise ShardsMissingError(
                f"{out} holds no build plan; give the source, the tokenizer and the folder: "
                "`megaback shards build --source SRC --tokenizer MODEL --out OUT`"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise OutputExistsError(
                f"{path} is damaged, or another version of megaback wrote it "
                f"({error!s:.300}); choose another `out`, or remove that folder"
            ) from None
        return plan


def require_no_links(out: Path) -> None:
    """Check that no folder of a build is a link to another place. Raises OutputExistsError."""
    for folder in (BUILD_FOLDER, STAGED_FOLDER):
        require_no_link(out / folder)


def make_plan(
    settings: BuildSettings, num_tasks: int | None = None, out: Path | None = None
) -> Plan:
    """List the sources and cut them into tasks; `num_tasks` None chooses their number.

    Depends on the sources' contents and the settings alone. Raises the errors of the sources,
    OutputExistsError when a link in a source leads to `out`, and ConfigError when a file would be
    in the train set and in the val set.
    """
    listings = [_listed(part.source, settings) for part in settings.sources]
    if out is not None:
        for part, listing in zip(settings.sources, listings, strict=True):
            listing.require_outside(part.source, out)
    read: dict[bool, list[Slice]] = {True: [], False: []}
    for part, listing in zip(settings.sources, listings, strict=True):
        read[part.split == "val"].extend(listing.slices)
    require_none_shared(train=read[False], val=read[True])
    skipped = merged(listing.skipped for listing in listings)
    plan = Plan(
        settings=settings,
        inputs=tuple(listing.slices for listing in listings),
        task_portions=(),
        requested_tasks=num_tasks,
        skipped=skipped,
    )
    sizes = [portion.piece.size_bytes * portion.fraction for portion in plan.portions]
    return replace(plan, task_portions=cut_evenly(sizes, num_tasks))


def _listed(source: str, settings: BuildSettings) -> Listing:
    if settings.tokenized is not None:
        return list_tokenized(source, settings.tokenized)
    return list_source(
        source,
        settings.columns,
        skips_bad=settings.on_bad_record == "skip",
        max_record_bytes=settings.max_record_bytes,
    )


def _passes(part: WeightedSource, slices: Sequence[Slice]) -> list[Portion]:
    return [
        Portion(piece, number, min(1.0, part.weight - number), part.split)
        for number in range(math.ceil(part.weight))
        for piece in slices
    ]


def cut_evenly(sizes_bytes: Sequence[float], num_tasks: int | None = None) -> tuple[int, ...]:
    """Number of consecutive portions of each task, for tasks of about the same size.

    Without `num_tasks`, about 64 tasks of 2 MiB to 1 GiB, none of them empty; or, where no size is
    known, one task per portion.
    """
    total_bytes = sum(sizes_bytes)
    task_bytes = min(max(total_bytes // _AIMED_TASKS, _SMALLEST_TASK_BYTES), _LARGEST_TASK_BYTES)
    sizes = sizes_bytes if total_bytes else [task_bytes] * len(sizes_bytes)
    total_bytes = sum(sizes)
    wanted = num_tasks or max(1, math.ceil(total_bytes / task_bytes))
    counts: Counter[int] = Counter()  # no list: the sizes that files claim may require billions
    before_bytes = 0.0
    for size in sizes:
        middle = (before_bytes + size / 2) / total_bytes
        counts[min(int(middle * wanted), wanted - 1)] += 1
        before_bytes += size
    return tuple(counts[index] for index in (range(wanted) if num_tasks else counts))
