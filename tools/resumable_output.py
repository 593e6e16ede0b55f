"""A file that a long command writes and resumes: results in chunks in a work folder beside it.

Tasks share the chunks; the one that completes the last writes the file. Its bytes depend on the
plan, which the work folder stores, not on kills or on which processes did the tasks.
"""

import hashlib
import json
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

import click

from data_pipeline.common.atomic import write_text
from data_pipeline.common.checked_json import read_json
from data_pipeline.common.file_hash import file_sha256
from data_pipeline.common.locks import locked
from data_pipeline.common.number_ranges import MANY, MANY_OR_ZERO
from data_pipeline.common.output_paths import (
    is_stream,
    is_vacant,
    read_object,
    require_apart,
    writing_output,
)
from data_pipeline.common.regular_files import require_no_link
from data_pipeline.errors import CheckpointMissingError, LaunchError, OutputExistsError
from data_pipeline.sources.jsonl import line_of
from megaback.run_folder import MODEL_CONFIG_NAME
from tools.resumable_chunks import ResumableChunks

_Function = TypeVar("_Function", bound=Callable[..., Any])
_Item = TypeVar("_Item")

PLAN_NAME = "plan.json"
OUTPUT_NAME = "output.json"
"""Name of the file in the work folder with the hashes of all outputs written from it."""
_PLAN_DRAFT = re.compile(rf"\.{re.escape(PLAN_NAME)}\..*\.partial")

out_option = click.option(
    "--out", required=True, type=click.Path(path_type=Path), help="File of JSON lines to write."
)
task_index_option = click.option(
    "--task-index",
    type=MANY_OR_ZERO.option,
    help="Index of the task to run, from 0. Default: all tasks.",
)


def tasks_option(items: str) -> Callable[[_Function], _Function]:
    """`--tasks`; `items` is what the tasks share."""
    return click.option(
        "--tasks",
        type=MANY.option,
        default=1,
        show_default=True,
        help=f"Number of tasks to split the {items} into.",
    )


def work_folder(out: Path) -> Path:
    """The folder of results beside the output, which is kept."""
    return out.with_name(f"{out.name}.work")


class ResumableOutput:
    """The output file of a command, its work folder, and the tasks."""

    def __init__(self, out: Path, num_tasks: int, task_index: int | None) -> None:
        """`task_index`: the task to run; None: all. Raises click.UsageError."""
        if task_index is not None and task_index >= num_tasks:
            raise click.UsageError(
                f"--task-index {task_index} is not less than --tasks {num_tasks}."
            )
        self.out = out
        self._num_tasks, self._task_index = num_tasks, task_index
        self._parts = ResumableChunks(work_folder(out), num_tasks)

    def require(self, inputs: Iterable[str | Path | None]) -> None:
        """Check that the output is absent, or unchanged since written. Raises OutputExistsError."""
        out = self.out
        if is_stream(out):
            raise OutputExistsError(
                f"--out {out} is not a regular file, which is needed to resume; name one"
            )
        require_apart(out, inputs)
        if not is_vacant(out) and (out.is_dir() or file_sha256(out) not in self._written()):
            raise OutputExistsError(
                f"{out} holds something that this command did not write, or that was modified "
                "since; choose another --out"
            )

    def claim(self, plan: dict[str, Any]) -> None:
        """Create the work folder with this plan, or check that it has the same one."""
        require_plan(work_folder(self.out), plan)

    @property
    def waiting(self) -> list[int]:
        """Tasks of this process that are not done."""
        wanted = range(self._num_tasks) if self._task_index is None else [self._task_index]
        return [task for task in wanted if not self._parts.is_done(task)]

    @contextmanager
    def chunks(self, task: int, every: Iterator[list[_Item]]) -> Iterator[Iterator[list[_Item]]]:
        """The missing chunks of a task, of `every` chunk; `append` their results in this order.

        The task is done at the end of the block. Raises LaunchError if another process runs it.
        """
        with locked(self._parts.lock_path(task), wait=False) as is_ours:
            if not is_ours:
                raise LaunchError(
                    f"another process is running task {task} of {self.out}; wait for it, or stop it"
                )
            done = self._parts.resume(task)
            if done:
                click.echo(f"task {task} resumes after {done} chunks", err=True)
            yield islice(every, task + done * self._num_tasks, None, self._num_tasks)
            self._parts.finish(task)

    def append(self, task: int, results: list[Any]) -> None:
        """Store the results of a chunk durably. Raises OSError."""
        self._parts.append(task, results)

    def is_complete(self) -> bool:
        """Whether all tasks are done; prints a line if some are missing."""
        missing = self._parts.missing
        if missing:
            click.echo(
                f"task {self._task_index} is done; {len(missing)} of {self._num_tasks} are still "
                "missing"
            )
        return not missing

    def results(self) -> Iterator[Any]:
        """Results of all tasks, in the order of the items. Raises StorageError."""
        return (result for chunk in self._parts.read_all() for result in chunk)

    def write(self, rows: Iterable[dict[str, Any]], *, overwrite: bool, differs: str) -> None:
        """Write the output. `differs`: how an earlier one may have been written, for the error.

        Raises OutputExistsError for another output, without `overwrite`.
        """
        digest = hashlib.sha256()
        out = self.out
        with writing_output(out, overwrite=overwrite or not is_vacant(out)) as file:
            for row in rows:
                line = line_of(row)
                digest.update(line)
                file.write(line)
            found = digest.hexdigest()
            if not overwrite and not is_vacant(out) and file_sha256(out) != found:
                raise OutputExistsError(
                    f"{out} was written {differs}; add --overwrite to replace it, or remove it"
                )
            hashes = list(dict.fromkeys([*self._written(), found]))
            write_text(work_folder(out) / OUTPUT_NAME, json.dumps({"sha256": hashes}) + "\n")

    def _written(self) -> list[str]:
        """Hashes of all outputs written from this work folder."""
        hashes = (read_object(work_folder(self.out) / OUTPUT_NAME) or {}).get("sha256")
        return hashes if isinstance(hashes, list) else []


def require_plan(folder: Path, plan: dict[str, Any]) -> None:
    """Create a work folder with this plan, or check that it has the same one.

    Raises OutputExistsError for another plan, and for a folder that has other files and no plan.
    """
    require_no_link(folder)
    path = folder / PLAN_NAME
    if not path.exists():
        is_foreign = (not folder.is_dir() and folder.exists()) or _has_other_files(folder)
        if is_foreign and not path.exists():  # else another task has just created it
            raise OutputExistsError(
                f"{folder}, the work folder, already holds something that this command did not "
                "write; choose another --out"
            )
        folder.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(plan, indent=2) + "\n")
        return
    try:
        found = read_json(path)
    except (OSError, ValueError):
        found = {}
    for key in plan:
        if found.get(key) != plan[key]:
            raise OutputExistsError(
                f"{folder} was created with another {key}; use the same one, choose another --out, "
                "or remove that folder"
            )


def converted(path: Path) -> Path:
    """The model folder of a run or a checkpoint; avoids importing torch if it is one already."""
    if (path / MODEL_CONFIG_NAME).is_file():
        return path
    from megaback.weights.converted import model_folder

    return model_folder(path)


def identity(model: Path) -> str:
    """Identity of a model folder: the hash of config.json, which has the hashes of weights."""
    try:
        return hashlib.sha256((model / MODEL_CONFIG_NAME).read_bytes()).hexdigest()
    except FileNotFoundError:
        raise CheckpointMissingError(
            f"{model} holds no model: {MODEL_CONFIG_NAME} is missing; create one by "
            "`megaback convert`"
        ) from None


def _has_other_files(folder: Path) -> bool:
    """Whether a work folder without a plan holds anything but locks and drafts of plans."""
    return folder.is_dir() and any(
        path.suffix != ".lock" and not _PLAN_DRAFT.fullmatch(path.name) for path in folder.iterdir()
    )
