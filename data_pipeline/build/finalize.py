"""`megaback shards finalize`: turns the finished tasks of a build into a data set.

The manifest is written last. Finalizing again, or from two processes at once, changes nothing.
"""

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import click

from data_pipeline.build.options import echo_manifest, num_workers
from data_pipeline.build.plan import BUILD_FOLDER, PLAN_DRAFT, PLAN_NAME, STAGED_FOLDER, Plan, Task
from data_pipeline.build.selection import (
    choose_documents,
    tasks_within_limits,
    write_selection,
)
from data_pipeline.build.task import TaskRecord, finished_record, record_path
from data_pipeline.build.val_minimum import with_val_minimum
from data_pipeline.common.atomic import replacing, write_text
from data_pipeline.common.checked_json import read_json
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.limits import MAX_PLAN_BYTES
from data_pipeline.common.locks import locked
from data_pipeline.common.next_command import command
from data_pipeline.common.own_files import unfinished_in
from data_pipeline.common.process_pool import run_in_processes
from data_pipeline.common.shared_options import workers_option
from data_pipeline.errors import OutputExistsError, ShardsMissingError, SourceEmptyError
from data_pipeline.shards.manifest import (
    FILE_NAME,
    MANIFEST_NAME,
    SHARD_NAME,
    Manifest,
)
from data_pipeline.sources.skipped import merged, why_records_are_bad
from data_pipeline.storage.address_variables import kept_in
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.tokenizer import find_tokenizer

BUILDERS_LOCK = Path(BUILD_FOLDER) / "builders.lock"
"""Lock of a folder: shared by builders, exclusive while files are removed."""
_FINALIZE_LOCK = Path(BUILD_FOLDER) / "finalize.lock"
_RECORD_NAME = re.compile(rf"(task|selected)-[0-9]{{5,}}\.json|{PLAN_DRAFT.pattern}")
"""Names of the files in BUILD_FOLDER."""


def finalize_build(plan: Plan, codec: TextCodec, out: Path, workers: int) -> Manifest:
    """Check that every task is complete, choose documents to keep, and write the manifest.

    Raises ShardsMissingError naming the tasks that are not done, SourceEmptyError when nothing is
    left to train on, OutputExistsError when a finished data set has lost shards.
    """
    with locked(out / _FINALIZE_LOCK):
        if (out / MANIFEST_NAME).exists():
            return finished_build(out)
        tasks, records = with_val_minimum(
            *_whole_tasks(plan, out), plan.num_tasks, out, codec.model_bytes, workers
        )
        if plan.settings.selects:
            records = _select(tasks, records, out, workers)
        manifest = _manifest(plan, codec, tasks, records)
        if not manifest.split("train"):
            for task in tasks:
                record_path(out, task.index).unlink(missing_ok=True)  # not worth keeping
            raise _nothing_to_train_on(manifest)
        with replacing(out / codec.file_name) as file:
            file.write(codec.model_bytes)
        with locked(out / BUILDERS_LOCK, wait=False) as alone:
            if alone:  # else another process may still be writing its hidden files
                remove_all_but(out, {shard.file for shard in manifest.shards})
            _clean_plan(out)
            manifest.save(out)
            if alone:
                shutil.rmtree(out / STAGED_FOLDER, ignore_errors=True)
        return manifest


def _clean_plan(out: Path) -> None:
    """Remove secrets of addresses from a plan that an earlier version wrote."""
    path = out / PLAN_NAME
    fields = read_json(path, MAX_PLAN_BYTES)
    if (clean := kept_in(fields)) != fields:
        write_text(path, json.dumps(clean, indent=1) + "\n")


def _nothing_to_train_on(manifest: Manifest) -> SourceEmptyError:
    counted = ", ".join(f"{number} {name}" for name, number in manifest.excluded.items())
    reasons = why_records_are_bad(manifest.skipped)
    advice = "fix the records, or name the columns" if reasons else "give a source with text"
    return SourceEmptyError(
        f"the source {manifest.source} holds no text to train on "
        f"({manifest.total('val')['documents']} documents in the val set; excluded: "
        f"{counted or 'none'}{reasons and f'; why records are bad: {reasons}'}); {advice}"
    )


def finished_build(out: Path) -> Manifest:
    """As `finished_manifest`; also removes files of builders that were late or killed."""
    manifest = finished_manifest(out)
    if (out / STAGED_FOLDER).exists() or any(_drafts(out)):
        with suppress(OSError), locked(out / BUILDERS_LOCK, wait=False) as alone:
            if alone:
                shutil.rmtree(out / STAGED_FOLDER, ignore_errors=True)
                for path in _drafts(out):
                    path.unlink(missing_ok=True)
    return manifest


def finished_manifest(out: Path) -> Manifest:
    """The manifest of a finished data set. Raises OutputExistsError when shards are gone."""
    manifest = Manifest.load(out)
    for shard in manifest.shards:
        path = out / shard.file
        if path.is_symlink() or not path.is_file() or path.stat().st_size != shard.file_bytes:
            raise OutputExistsError(
                f"{out} is a finished data set, but its shard {shard.file} is missing or was "
                "changed; choose another `out`, or remove that folder"
            )
    return manifest


def remove_all_but(out: Path, names: set[str]) -> None:
    """Remove shards that killed processes or changed portions left behind."""
    shards = (path for path in out.glob("*.zst") if SHARD_NAME.fullmatch(path.name))
    for path in [*shards, *_drafts(out)]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _drafts(out: Path) -> list[Path]:
    """Unfinished files of builds."""
    hidden = out / BUILD_FOLDER
    plans = [path for path in hidden.glob(f"{PLAN_NAME}.*") if PLAN_DRAFT.fullmatch(path.name)]
    return [*unfinished_in(out, FILE_NAME), *unfinished_in(hidden, _RECORD_NAME), *plans]


def unfinished_tasks(plan: Plan, out: Path) -> list[int]:
    """Indices of the tasks within the limits that are not done."""
    return _tasks_and_records(plan, out)[2]


def _whole_tasks(plan: Plan, out: Path) -> tuple[Sequence[Task], list[TaskRecord]]:
    """The tasks within the limits, and their records. Raises ShardsMissingError."""
    tasks, records, missing = _tasks_and_records(plan, out)
    if missing:
        named = ", ".join(map(str, missing[:8])) + (" and others" if len(missing) > 8 else "")
        raise ShardsMissingError(
            f"{len(missing)} of {plan.num_tasks} tasks of {out} are not done ({named}); "
            f"run `{command('shards', 'build', '--out', out)}`, with `task_index` for one of them"
        )
    return tasks, [record for record in records if record]


def _tasks_and_records(
    plan: Plan, out: Path
) -> tuple[Sequence[Task], list[TaskRecord | None], list[int]]:
    """The tasks within the limits, their records, and the indices of those without one."""
    tasks = plan.tasks
    # Listing a network folder gives its current files; looking up a name may use a stale cache.
    there = {path.name for path in (out / BUILD_FOLDER).glob("task-*.json")}
    records = [
        finished_record(task, out) if record_path(out, task.index).name in there else None
        for task in tasks
    ]
    needed = tasks_within_limits(plan.settings, records)
    missing = [index for index in range(needed) if not records[index]]
    return tasks[:needed], records[:needed], missing


def _select(
    tasks: Sequence[Task], records: Sequence[TaskRecord], out: Path, workers: int
) -> list[TaskRecord]:
    chosen = choose_documents(tasks, out)
    calls = [
        (task, record, keep, excluded, out)
        for task, record, (keep, excluded) in zip(tasks, records, chosen, strict=True)
    ]
    selected = dict(run_in_processes(write_selection, calls, workers))
    return [selected[index] for index in range(len(calls))]


def _manifest(
    plan: Plan, codec: TextCodec, tasks: Sequence[Task], records: Sequence[TaskRecord]
) -> Manifest:
    settings = plan.settings
    val_fraction = max(task.settings.val_fraction for task in tasks)
    names = sorted({name for record in records for name in record.excluded})
    return Manifest(
        text_format=codec.format,
        vocab_size=codec.vocab_size,
        begin_id=codec.begin_id,
        end_id=codec.end_id,
        id_bytes=codec.id_dtype.itemsize,
        frame_tokens=settings.frame_tokens,
        source=settings.description,
        val_fraction=val_fraction,
        requested_val_fraction=None
        if val_fraction == settings.val_fraction
        else settings.val_fraction,
        row_tokens=settings.row_tokens,
        excluded={name: sum(record.excluded.get(name, 0) for record in records) for name in names},
        skipped=merged([plan.skipped, *(record.skipped for record in records)]),
        shards=tuple(
            sorted(
                (shard for record in records for shard in record.shards),
                key=lambda shard: shard.file,
            )
        ),
    )


def codec_of_plan(plan: Plan, out: Path) -> TextCodec:
    """The codec that a plan was made with, from the copy of the tokenizer beside it.

    Raises TokenizerError, and TokenizerMismatchError when the copy is another tokenizer.
    """
    settings = plan.settings
    codec = TextCodec.load(find_tokenizer(out), Direction(settings.direction), Unit(settings.unit))
    plan.settings.require_same(
        replace(settings, tokenizer_sha256=codec.format.tokenizer_sha256), out
    )
    return codec


@click.command(
    cls=ResumableCommand,
    name="finalize",
    epilog=examples(
        "megaback shards finalize data/books",
        "megaback shards finalize data/books --workers 8",
    ),
)
@click.argument("out", type=click.Path(path_type=Path))
@workers_option("processes")
def main(out: Path, workers: int | None) -> None:
    """Check that every task of the build in OUT is complete, and write the manifest."""
    plan = Plan.load(out)
    codec = codec_of_plan(plan, out)
    manifest = finalize_build(plan, codec, out, num_workers(workers))
    echo_manifest(manifest, out)


if __name__ == "__main__":
    main()
