"""`megaback shards plan`, and the plan of a folder, which the first of several builders writes."""

import re
import uuid
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from data_pipeline.build.options import (
    settings_from,
    settings_options,
    tasks_option,
)
from data_pipeline.build.plan import BUILD_FOLDER, PLAN_NAME, Plan, make_plan, require_no_links
from data_pipeline.build.settings import (
    CHANGEABLE,
    BuildSettings,
)
from data_pipeline.common.atomic import claim_name, replacing, sync_folder, write_text
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.next_command import command, show_next
from data_pipeline.common.shared_options import out_folder_option
from data_pipeline.errors import OutputExistsError
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from data_pipeline.sources.record_limits import TOO_LONG
from data_pipeline.sources.registry import require_outside
from data_pipeline.sources.skipped import (
    RECORDS,
    skipped_lines,
)
from data_pipeline.text.codec import TextCodec
from data_pipeline.text.tokenizer import TOKENIZER_NAMES

_OF_A_BUILD = re.compile(r"task-.*|plan\.json\..*|staged|.*\.lock|\..*\.partial")
"""Names in BUILD_FOLDER."""


def claim_plan(
    settings: BuildSettings, codec: TextCodec, out: Path, num_tasks: int | None
) -> tuple[Plan, bool]:
    """The plan of a folder, existing or new, and whether it is new.

    Of several processes that start at once, one writes the plan and the others use it. Raises the
    errors of the sources, and of `BuildSettings.require_same` when the folder is of another build.
    """
    for part in settings.sources:
        require_outside(part.source, out)
    require_no_links(out)
    if not (out / PLAN_NAME).exists():
        if out.exists() and (not out.is_dir() or _holds_something_else(out)):
            raise OutputExistsError(f"{out} is not the folder of a build; choose another `out`")
        plan = make_plan(settings, num_tasks, out)
        if write_first(plan, codec, out):
            return plan, True
    plan = Plan.load(out)
    plan.settings.require_same(settings, out)
    require_same_tasks(plan, out, num_tasks)
    changed = {name: getattr(settings, name) for name in CHANGEABLE}
    return handling_records(plan, changed, out), False


def handling_records(plan: Plan, changed: Mapping[str, Any], out: Path) -> Plan:
    """The plan with other settings of which records are malformed and what happens to them.

    `changed` has some of `CHANGEABLE`. Raises OutputExistsError when a finished data set would
    have other records with them.
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
            f"{out} is a finished data set whose build skipped {bad:,} malformed records; set "
            "`on_bad_record` to skip, or choose another `out`"
        )
    is_other_length = settings.max_record_bytes != plan.settings.max_record_bytes
    if is_other_length and TOO_LONG in manifest.skipped.get(RECORDS, {}):
        raise OutputExistsError(
            f"{out} is a finished data set whose build skipped records longer than "
            f"`max_record_bytes` {plan.settings.max_record_bytes}; set the same, or choose another "
            "`out`"
        )
    return plan


def require_same_tasks(plan: Plan, out: Path, num_tasks: int | None) -> None:
    """Raises OutputExistsError when a plan has another number of tasks than requested."""
    if num_tasks is not None and num_tasks != plan.num_tasks:
        raise OutputExistsError(
            f"the plan in {out} has {plan.num_tasks} tasks, not {num_tasks}; set `tasks` to "
            f"{plan.num_tasks} or omit it, or choose another `out`"
        )


def renew_plan(plan: Plan, settings: BuildSettings) -> tuple[Plan, bool]:
    """List the sources again. Returns the plan as it would be now, and whether its input changed.

    Tasks whose input is the same are the same. Raises the errors of the sources.
    """
    renewed = make_plan(settings, plan.requested_tasks)
    has_changed = _identities(renewed) != _identities(plan)
    # The cut into tasks stays; their input is read from the addresses given now.
    again = replace(plan, inputs=renewed.inputs, skipped=renewed.skipped)
    return (renewed if has_changed else again), has_changed


def _identities(plan: Plan) -> list[list[tuple[object, ...]]]:
    return [[piece.identity for piece in slices] for slices in plan.inputs]


def write_first(plan: Plan, codec: TextCodec, out: Path) -> bool:
    """Write the plan and the tokenizer; False if another process wrote its plan first.

    Flushed to disk on return, so that no shard is in a folder without its plan.
    """
    was_there = out.exists()
    draft = out / BUILD_FOLDER / f"{PLAN_NAME}.{uuid.uuid4().hex}"
    try:
        draft.parent.mkdir(parents=True, exist_ok=True)
        write_text(draft, plan.to_json())
        with replacing(out / codec.file_name) as file:
            file.write(codec.model_bytes)
        with suppress(FileExistsError):
            claim_name(draft, out / PLAN_NAME)
            sync_folder(out)
            return True
        return False
    except BaseException:
        draft.unlink(missing_ok=True)
        with suppress(OSError):  # only empty folders: other processes may use them
            draft.parent.rmdir()
            if not was_there:
                out.rmdir()
        raise
    finally:
        draft.unlink(missing_ok=True)


def _holds_something_else(out: Path) -> bool:
    """Whether there is more than the files of a build, perhaps one killed before its plan."""
    names = {path.name for path in out.iterdir()}
    if PLAN_NAME in names:  # another process has just written it
        return False
    if BUILD_FOLDER not in names:  # a tokenizer alone is not from a build
        return bool(names)
    ours = {BUILD_FOLDER, *TOKENIZER_NAMES}
    partial = tuple(f".{name}." for name in TOKENIZER_NAMES)
    return any(name not in ours and not name.startswith(partial) for name in names) or not all(
        _OF_A_BUILD.fullmatch(path.name) for path in (out / BUILD_FOLDER).iterdir()
    )


@click.command(
    cls=ResumableCommand,
    name="plan",
    epilog=examples(
        "megaback shards plan --source 'books/*.jsonl.zst' --out data/books --tokenizer "
        "data/tokenizer/tokenizer.model",
        "megaback shards plan --source hf:HuggingFaceFW/fineweb-edu:sample-100BT --tokenizer "
        "data/tokenizer/tokenizer.model --out data/fineweb-edu --tasks 256 --language en "
        "--min-characters 200",
    ),
)
@settings_options
@out_folder_option
@tasks_option
@click.option("--overwrite", is_flag=True, help="Replace an existing plan: list the sources again.")
def main(out: Path, tasks: int | None, overwrite: bool, **options: Any) -> None:
    """List the sources, freeze the list, and cut it into tasks."""
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
