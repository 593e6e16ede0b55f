"""`megaback shards plan`: what a build reads, frozen, and cut into tasks.

`plan.json` names every file with its size and the stamp of its content, and the tasks that share
them. Whoever builds, on whatever machine, reads what the plan says: a file that has changed since
is an error, and one that was added later does not count.
"""

import hashlib
import json
import math
import re
import uuid
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import click

from data_pipeline.build.options import (
    out_option,
    settings_from,
    settings_options,
    tasks_option,
)
from data_pipeline.build.plan_files import files_of, slices_of
from data_pipeline.build.settings import (
    CHANGEABLE,
    BuildSettings,
    WeightedSource,
    content_settings,
)
from data_pipeline.common.atomic import claim_name, replacing, sync_folder, write_text
from data_pipeline.common.checked_json import briefly, checked, read_json, require_within
from data_pipeline.common.command import ResumableCommand
from data_pipeline.common.limits import MAX_PLAN_BYTES
from data_pipeline.common.next_command import command, show_next
from data_pipeline.common.regular_files import require_no_link
from data_pipeline.errors import ConfigError, OutputExistsError, ShardsMissingError
from data_pipeline.shards.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest
from data_pipeline.sources.documents import Slice
from data_pipeline.sources.record_limits import TOO_LONG
from data_pipeline.sources.registry import list_source, require_none_shared, require_outside
from data_pipeline.sources.skipped import (
    RECORDS,
    Skipped,
    merged,
    skipped_from_json,
    skipped_lines,
    skipped_to_json,
)
from data_pipeline.text.codec import TextCodec

PLAN_NAME = "plan.json"
BUILD_FOLDER = ".build"
STAGED_FOLDER = Path(BUILD_FOLDER) / "staged"
FORMAT_NAME = "megaback-plan"
FORMAT_VERSION = 1

PLAN_DRAFT = re.compile(r"plan\.json\.[0-9a-f]{1,32}")
_OF_A_BUILD = re.compile(r"task-.*|plan\.json\..*|staged|.*\.lock|\..*\.partial")
"""Names in BUILD_FOLDER."""
_SMALLEST_TASK_BYTES = 2 << 20
_LARGEST_TASK_BYTES = 1 << 30
_AIMED_TASKS = 64
_MAX_PORTIONS = 1 << 24
_MAX_TASKS = 1 << 20
"""As many as --tasks may ask for."""


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
    """What one process reads, one portion after another."""

    index: int
    portions: tuple[Portion, ...]
    settings: BuildSettings

    @property
    def sha256(self) -> str:
        """Names the task's result: equal tasks write equal bytes."""
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
    """How many portions each task takes, in order."""
    requested_tasks: int | None
    """The number of tasks that was asked for; None: chosen by size."""
    skipped: Skipped = field(default_factory=dict)
    """Files of the sources that are not read, by cause."""

    @property
    def portions(self) -> tuple[Portion, ...]:
        """Everything that is read, in order: the passes of the first source, then the next one."""
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
        _require_no_links(out)
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
                f"{out} holds no plan of a build; name the source, the tokenizer and the folder: "
                "`megaback shards build --source SRC --tokenizer MODEL --out OUT`"
            ) from None
        except (ValueError, KeyError, TypeError, AttributeError, ConfigError) as error:
            raise OutputExistsError(
                f"{out} was begun by another version of megaback, or {path} is broken "
                f"({error!s:.300}); choose another `out`, or remove that folder"
            ) from None
        return plan


def make_plan(
    settings: BuildSettings, num_tasks: int | None = None, out: Path | None = None
) -> Plan:
    """List the sources and cut them into tasks; `num_tasks` None chooses their number.

    Depends on the sources' contents and the settings alone. Raises the errors of the sources,
    OutputExistsError when a link in a source leads to `out`, and ConfigError when a file would be
    in the train set and in the val set.
    """
    columns = settings.columns
    how: dict[str, Any] = {"skips_bad": settings.on_bad_record == "skip"}
    how["max_record_bytes"] = settings.max_record_bytes
    listings = [list_source(part.source, columns, **how) for part in settings.sources]
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


def _passes(part: WeightedSource, slices: Sequence[Slice]) -> list[Portion]:
    return [
        Portion(piece, number, min(1.0, part.weight - number), part.split)
        for number in range(math.ceil(part.weight))
        for piece in slices
    ]


def cut_evenly(sizes_bytes: Sequence[float], num_tasks: int | None = None) -> tuple[int, ...]:
    """How many neighbouring portions each task takes, for tasks of about the same size.

    Without `num_tasks`, about 64 tasks of 2 MiB to 1 GiB, none of them empty; or, where no size is
    known, a task for each portion.
    """
    total_bytes = sum(sizes_bytes)
    task_bytes = min(max(total_bytes // _AIMED_TASKS, _SMALLEST_TASK_BYTES), _LARGEST_TASK_BYTES)
    sizes = sizes_bytes if total_bytes else [task_bytes] * len(sizes_bytes)
    total_bytes = sum(sizes)
    wanted = num_tasks or max(1, math.ceil(total_bytes / task_bytes))
    counts: Counter[int] = Counter()  # no list: sizes are what files claim, and may want billions
    before_bytes = 0.0
    for size in sizes:
        middle = (before_bytes + size / 2) / total_bytes
        counts[min(int(middle * wanted), wanted - 1)] += 1
        before_bytes += size
    return tuple(counts[index] for index in (range(wanted) if num_tasks else counts))


def claim_plan(
    settings: BuildSettings, codec: TextCodec, out: Path, num_tasks: int | None
) -> tuple[Plan, bool]:
    """The plan of a folder: the one that is there, or a new one. Second: whether it is new.

    Of several processes that come at once, one writes the plan and the others use it. Raises the
    errors of the sources, and of `BuildSettings.require_same` when the folder is of another build.
    """
    for part in settings.sources:
        require_outside(part.source, out)
    _require_no_links(out)
    if not (out / PLAN_NAME).exists():
        if out.exists() and (not out.is_dir() or _holds_something_else(out)):
            raise OutputExistsError(
                f"{out} already holds something that is no build of shards; choose another `out`"
            )
        plan = make_plan(settings, num_tasks, out)
        if write_first(plan, codec, out):
            return plan, True
    plan = Plan.load(out)
    plan.settings.require_same(settings, out)
    require_same_tasks(plan, out, num_tasks)
    changed = {name: getattr(settings, name) for name in CHANGEABLE}
    return handling_records(plan, changed, out), False


def handling_records(plan: Plan, changed: Mapping[str, Any], out: Path) -> Plan:
    """The plan with other choices of which records fail, and how, as a resumed build may make them.

    `changed` has some of `CHANGEABLE`. Raises OutputExistsError when a finished data set would have
    left out other records.
    """
    settings = replace(plan.settings, **changed)
    if settings == plan.settings:
        return plan
    if not (out / MANIFEST_NAME).exists():
        plan = replace(plan, settings=settings)
        write_text(out / PLAN_NAME, plan.to_json())
        return plan
    manifest = Manifest.load(out)
    if settings.on_bad_record == "stop" and (bad := manifest.excluded.get("bad_record")):
        raise OutputExistsError(
            f"{out} is a finished data set that left out {bad:,} malformed records; give "
            "`on_bad_record` skip, or choose another `out`"
        )
    is_other_length = settings.max_record_bytes != plan.settings.max_record_bytes
    if is_other_length and TOO_LONG in manifest.skipped.get(RECORDS, {}):
        raise OutputExistsError(
            f"{out} is a finished data set that left out records longer than `max_record_bytes` "
            f"{plan.settings.max_record_bytes}; give that, or choose another `out`"
        )
    return plan


def require_same_tasks(plan: Plan, out: Path, num_tasks: int | None) -> None:
    """Raises OutputExistsError when a plan has another number of tasks than was asked for."""
    if num_tasks is not None and num_tasks != plan.num_tasks:
        raise OutputExistsError(
            f"{out} was planned as {plan.num_tasks} tasks, not {num_tasks}; give `tasks` "
            f"{plan.num_tasks} or none, or choose another `out`"
        )


def renew_plan(plan: Plan, settings: BuildSettings) -> tuple[Plan, bool]:
    """List the sources again. Returns the plan as it would be now, and whether it reads others.

    Tasks whose input is the same are the same. Raises the errors of the sources.
    """
    renewed = make_plan(settings, plan.requested_tasks)
    has_changed = _identities(renewed) != _identities(plan)
    # The tasks stay as they were cut, and are read by the addresses that are given now.
    again = replace(plan, inputs=renewed.inputs, skipped=renewed.skipped)
    return (renewed if has_changed else again), has_changed


def _identities(plan: Plan) -> list[list[tuple[object, ...]]]:
    return [[piece.identity for piece in slices] for slices in plan.inputs]


def write_first(plan: Plan, codec: TextCodec, out: Path) -> bool:
    """Write the plan and the tokenizer, unless another process was faster.

    What was written is on the disk when this returns: no shard lies in a folder without its plan.
    """
    was_there = out.exists()
    draft = out / BUILD_FOLDER / f"{PLAN_NAME}.{uuid.uuid4().hex}"
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        write_text(draft, plan.to_json())
        with replacing(out / TOKENIZER_NAME) as file:
            file.write(codec.model_bytes)
        with suppress(FileExistsError):
            claim_name(draft, out / PLAN_NAME)
            sync_folder(out)
            return True
        return False
    except BaseException:
        draft.unlink(missing_ok=True)
        with suppress(OSError):  # others may be here too: only what is empty goes
            draft.parent.rmdir()
            if not was_there:
                out.rmdir()
        raise
    finally:
        draft.unlink(missing_ok=True)


def _require_no_links(out: Path) -> None:
    for folder in (BUILD_FOLDER, STAGED_FOLDER):
        require_no_link(out / folder)


def _holds_something_else(out: Path) -> bool:
    """What a build leaves that was stopped before it could write its plan is ours."""
    names = {path.name for path in out.iterdir()}
    if PLAN_NAME in names:  # another process has just written it
        return False
    if BUILD_FOLDER not in names:  # a tokenizer alone is somebody's
        return bool(names)
    ours = {BUILD_FOLDER, TOKENIZER_NAME}
    return any(
        name not in ours and not name.startswith(f".{TOKENIZER_NAME}.") for name in names
    ) or not all(_OF_A_BUILD.fullmatch(path.name) for path in (out / BUILD_FOLDER).iterdir())


@click.command(cls=ResumableCommand, name="plan")
@settings_options
@out_option
@tasks_option
@click.option("--overwrite", is_flag=True, help="Replace a plan: list the sources again.")
def main(out: Path, tasks: int | None, overwrite: bool, **options: Any) -> None:
    """List the sources, freeze what is read, and cut it into tasks."""
    settings, codec = settings_from(options)
    is_replaced = overwrite and (out / PLAN_NAME).exists()
    plan, is_new = claim_plan(settings, codec, out, None if is_replaced else tasks)
    if not is_new and overwrite:
        plan = _overwrite(plan, settings, out, tasks)
    files = {(piece.kind, piece.path) for slices in plan.inputs for piece in slices}
    click.echo(
        f"{len(files):,} files of {plan.input_bytes:,} bytes in {len(plan.portions):,} portions: "
        f"{plan.num_tasks:,} tasks"
    )
    for line in skipped_lines(plan.skipped):
        click.echo(line)
    click.echo(f"{'written to' if is_new or overwrite else 'already in'} {out / PLAN_NAME}")
    build = ("shards", "build", "--out", out)
    one = command(*build, "--tasks", plan.num_tasks, "--task-index", 0)
    show_next({command(*build): "all tasks", one: f"one of them; the last is {plan.num_tasks - 1}"})


def _overwrite(plan: Plan, settings: BuildSettings, out: Path, num_tasks: int | None) -> Plan:
    if (out / MANIFEST_NAME).exists():
        raise OutputExistsError(f"{out} is a finished data set; choose another `out`")
    renewed = make_plan(replace(plan.settings, sources=settings.sources), num_tasks)
    write_text(out / PLAN_NAME, renewed.to_json())
    return renewed


if __name__ == "__main__":
    main()
