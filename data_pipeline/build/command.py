"""`megaback shards build`: encodes sources into a folder of shards with a manifest.

The sources are listed and cut into tasks, which a pool of processes or the elements of a Slurm
array run. After a kill the same command resumes, and the result is byte for byte that of an
uninterrupted build, with any number of workers. The manifest is written last.
"""

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import click

from data_pipeline.build.finalize import (
    BUILDERS_LOCK,
    codec_of_plan,
    finalize_build,
    finished_build,
    remove_all_but,
    unfinished_tasks,
)
from data_pipeline.build.options import (
    echo_manifest,
    is_given,
    num_workers,
    require_no_settings,
    settings_from,
    settings_options,
    tasks_option,
)
from data_pipeline.build.plan import BUILD_FOLDER, PLAN_NAME, Plan, Task
from data_pipeline.build.plan_command import (
    claim_plan,
    handling_records,
    renew_plan,
    require_same_tasks,
    write_first,
)
from data_pipeline.build.progress import SharedCounts, showing_progress
from data_pipeline.build.selection import tasks_within_limits
from data_pipeline.build.settings import CHANGEABLE, BuildSettings
from data_pipeline.build.task import TaskRecord, finished_record, run_task
from data_pipeline.common.atomic import write_text
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.locks import locked
from data_pipeline.common.process_pool import run_in_processes, shared_by_all
from data_pipeline.common.shared_options import out_folder_option, workers_option
from data_pipeline.errors import ConfigError, OutputExistsError
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from data_pipeline.text.codec import TextCodec
from data_pipeline.text.tokenizer import TOKENIZER_NAMES

_ARRAY_INDEX_VARIABLE = "SLURM_ARRAY_TASK_ID"
_INDICES = re.compile(r"(\d{1,9})(?:-(\d{1,9}))?")


def build_shards(
    settings: BuildSettings,
    codec: TextCodec,
    out: Path,
    workers: int,
    num_tasks: int | None = None,
) -> tuple[Manifest, int]:
    """Build the shards of the sources in `out`, or resume an earlier build.

    Returns the manifest and the number of tasks that earlier builds had already finished. A source
    that changed since an earlier build began is listed again; tasks with unchanged input are not
    redone. Raises the errors of the sources; OutputExistsError, TokenizerMismatchError or
    DirectionMismatchError when `out` holds something else, which is not touched.
    """
    was_there = out.exists()
    plan, is_new = claim_plan(settings, codec, out, num_tasks)
    if not is_new:
        plan = _listed_again(plan, settings, out)
    try:
        return build_planned(plan, codec, out, workers)
    except BaseException:
        if is_new:
            _forget_if_nothing_is_done(out, was_there)
        raise


def build_planned(plan: Plan, codec: TextCodec, out: Path, workers: int) -> tuple[Manifest, int]:
    """Run all tasks of a plan, and finalize. Returns what `build_shards` does.

    Raises SourceUnreadableError for a file that changed since the plan, and OutputExistsError for
    a finished data set that lost a shard.
    """
    if (out / MANIFEST_NAME).exists():
        return finished_build(out), plan.num_tasks
    num_found = _do(plan.tasks, plan, codec, out, workers)
    return finalize_build(plan, codec, out, workers), num_found


def build_tasks(
    plan: Plan, indices: range, codec: TextCodec, out: Path, workers: int
) -> Manifest | None:
    """Run some tasks of a plan, and finalize if all of its tasks are done.

    Returns the manifest if finalized, else None. Raises ConfigError when there are no such tasks,
    and the errors of `build_planned`.
    """
    if indices.stop > plan.num_tasks:
        raise ConfigError(
            f"`task_index` is {indices.stop - 1}, but the plan in {out} has {plan.num_tasks} "
            f"tasks; choose 0 to {plan.num_tasks - 1}"
        )
    if (out / MANIFEST_NAME).exists():
        return finished_build(out)
    _do(plan.tasks[indices.start : indices.stop], plan, codec, out, workers)
    if unfinished_tasks(plan, out) and not (out / MANIFEST_NAME).exists():
        return None
    return finalize_build(plan, codec, out, workers)


def _do(tasks: tuple[Task, ...], plan: Plan, codec: TextCodec, out: Path, workers: int) -> int:
    """Run the given tasks that are not done. Returns the number of those that were."""
    with locked(out / BUILDERS_LOCK, shared=True):
        if (out / MANIFEST_NAME).exists():  # finished by another process
            return len(tasks)
        if not (out / PLAN_NAME).exists():  # removed by one that failed before we held the lock
            write_first(plan, codec, out)
        records = [finished_record(task, out) for task in tasks]
        num_found = sum(record is not None for record in records)
        try:
            _run(tasks, records, plan, codec, out, workers)
        except FileNotFoundError:
            if not (out / MANIFEST_NAME).exists():  # else finished and cleaned up without locks
                raise
    return num_found


def _run(
    tasks: tuple[Task, ...],
    records: list[TaskRecord | None],
    plan: Plan,
    codec: TextCodec,
    out: Path,
    workers: int,
) -> None:
    """Run the tasks that have no record, as far as the limits require; fills in `records`."""
    waiting = [number for number, record in enumerate(records) if record is None]
    needed = tasks_within_limits(plan.settings, records)
    waiting = [number for number in waiting if number < needed]
    counts = SharedCounts(plan.num_tasks)
    calls = [(tasks[number], out, codec.model_bytes) for number in waiting]
    input_bytes = sum(tasks[number].input_bytes for number in waiting)
    with showing_progress(counts, input_bytes):
        for number, record in run_in_processes(_run_counted, calls, workers, counts.raw):
            records[waiting[number]] = record
            if plan.settings.is_limited and all(
                records[: tasks_within_limits(plan.settings, records)]
            ):
                break


def _run_counted(task: Task, out: Path, model_bytes: bytes) -> TaskRecord:
    if record := finished_record(task, out):  # by another build of the same folder
        return record
    raw = shared_by_all()
    counts = None if raw is None else SharedCounts.of_task(raw, task.index)
    return run_task(task, out, model_bytes, counts)


def _listed_again(plan: Plan, settings: BuildSettings, out: Path) -> Plan:
    renewed, has_changed = renew_plan(plan, settings)
    is_finished = (out / MANIFEST_NAME).exists()
    if not has_changed and (is_finished or renewed == plan):
        return plan
    if is_finished:
        raise OutputExistsError(
            f"{out} is a finished data set, but {settings.description} has changed since; "
            "choose another `out`, or remove that folder"
        )
    write_text(out / PLAN_NAME, renewed.to_json())
    return renewed


def _forget_if_nothing_is_done(out: Path, was_there: bool) -> None:
    """After a failure, remove the files of the build unless a task of it is done."""
    with locked(out / BUILDERS_LOCK, wait=False) as alone:
        done = (out / MANIFEST_NAME).exists() or any((out / BUILD_FOLDER).glob("task-*.json"))
        if done or not alone:
            return
        remove_all_but(out, set())
        for name in (PLAN_NAME, *TOKENIZER_NAMES):
            (out / name).unlink(missing_ok=True)
        shutil.rmtree(out / BUILD_FOLDER, ignore_errors=True)
        if not was_there:
            with suppress(OSError):  # another process has added a file meanwhile
                out.rmdir()


def _indices(text: str) -> range:
    match = _INDICES.fullmatch(text)
    if not match or int(match[2] or match[1]) < int(match[1]):
        raise ConfigError(f"`task_index` is {text!r}; write a number, or a range such as 0-31")
    return range(int(match[1]), int(match[2] or match[1]) + 1)


@click.command(
    cls=ResumableCommand,
    name="build",
    epilog=examples(
        "megaback shards build --source pydocs --out data/pydocs --tokenizer "
        "data/tokenizer/tokenizer.model",
        "megaback shards build --source 'books/*.jsonl.zst' --weight 2.5 --source "
        "hf:HuggingFaceFW/fineweb-edu:sample-100BT --weight 1 --tokenizer "
        "data/tokenizer/tokenizer.model --out data/mixed",
        "megaback shards build --out data/planned --task-index 0-31",
    ),
)
@settings_options
@out_folder_option
@tasks_option
@click.option(
    "--task-index",
    help="Index of the task to run, or a range such as 0-31. Default: the index in a Slurm array.",
)
@workers_option("processes")
@click.pass_context
def main(
    ctx: click.Context,
    /,
    out: Path,
    tasks: int | None,
    task_index: str | None,
    workers: int | None,
    **options: Any,
) -> None:
    """Encode sources into compressed shards of (reversed) tokens.

    With --source and --tokenizer, plans and builds. Without them, executes the plan that
    `megaback shards plan` wrote to the folder.
    """
    if task_index is None and tasks is not None:
        task_index = os.environ.get(_ARRAY_INDEX_VARIABLE)
    if options["sources"]:
        settings, codec = settings_from(options)
        if task_index is None:
            manifest, num_found = build_shards(settings, codec, out, num_workers(workers), tasks)
            return _report(manifest, num_found, out, codec)
        plan, _ = claim_plan(settings, codec, out, tasks)
    else:
        require_no_settings(ctx)
        plan = Plan.load(out)
        require_same_tasks(plan, out, tasks)
        changed = {name: options[name] for name in CHANGEABLE if is_given(ctx, name)}
        plan = handling_records(plan, changed, out)
        codec = codec_of_plan(plan, out)
        if task_index is None:
            manifest, num_found = build_planned(plan, codec, out, num_workers(workers))
            return _report(manifest, num_found, out, codec)
    indices = _indices(task_index)
    finished = build_tasks(plan, indices, codec, out, num_workers(workers))
    if finished:
        return _report(finished, 0, out, codec)
    named = f"task {indices[0]}" if len(indices) == 1 else f"tasks {task_index}"
    click.echo(f"{named} of {plan.num_tasks} done; {out} is complete once all tasks are done")
    return None


def _report(manifest: Manifest, num_found: int, out: Path, codec: TextCodec) -> None:
    if num_found:
        click.echo(f"{num_found} tasks were already done")
    elif codec.encoder_name in ("sentencepiece", "tokenizers"):
        click.echo(
            f"encoded by {codec.encoder_name}, several times slower: kitoken is not installed, or "
            "is not exact for this tokenizer"
        )
    echo_manifest(manifest, out)


if __name__ == "__main__":
    main()
