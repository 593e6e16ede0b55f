"""`megaback shards build`: a source becomes a folder of shards with a manifest.

The source is listed, cut into tasks, and the tasks are run by a pool of processes. Whatever kills
the build, the same command goes on where it stopped, and the result is byte for byte that of an
uninterrupted build, with any number of workers. The manifest is written last.
"""

import json
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict
from multiprocessing import get_context, parent_process
from multiprocessing.connection import wait
from pathlib import Path
from threading import Thread

import click
from rich.console import Console
from rich.progress import Progress, TimeElapsedColumn

from data_pipeline.command import Command, replacing, write_text
from data_pipeline.errors import (
    ConfigError,
    DirectionMismatchError,
    LaunchError,
    OutputExistsError,
    SourceEmptyError,
    TokenizerMismatchError,
)
from data_pipeline.manifest import MANIFEST_NAME, TOKENIZER_NAME, Manifest
from data_pipeline.shard_format import DEFAULT_FRAME_TOKENS
from data_pipeline.sources import list_slices, require_outside
from data_pipeline.tasks import (
    BUILD_FOLDER,
    BuildSettings,
    Task,
    TaskRecord,
    cut_into_tasks,
    finished_record,
    run_task,
    same_but_source,
    same_source,
)
from data_pipeline.text import Direction, TextCodec, Unit

_SETTINGS_NAME = "settings.json"


def build_shards(
    settings: BuildSettings, codec: TextCodec, out: Path, workers: int
) -> tuple[Manifest, int]:
    """Build, or finish building, the shards of a source in `out`.

    Returns the manifest and the number of tasks that earlier builds had already finished. Raises
    the errors of the source; OutputExistsError, TokenizerMismatchError or DirectionMismatchError
    when `out` holds something else, which is left as it is.
    """
    _check_settings(settings)
    require_outside(settings.source, out)
    tasks = cut_into_tasks(list_slices(settings.source, text_column=settings.text_column), settings)
    was_there = out.exists()
    _claim_folder(out, settings)
    try:
        done = {task.index: record for task in tasks if (record := finished_record(task, out))}
        num_found = len(done)
        if (out / MANIFEST_NAME).exists():
            if num_found == len(tasks):
                return Manifest.load(out), num_found
            raise OutputExistsError(
                f"{out} is a finished data set, but {settings.source} has changed since, or some "
                "of its shards are gone; choose another --out, or remove that folder"
            )
        waiting = [task for task in tasks if task.index not in done]
        for task, record in _run(waiting, out, codec.model_bytes, workers):
            done[task.index] = record
        manifest = _finalize(settings, codec, [done[task.index] for task in tasks], out)
    except BaseException:
        _forget_if_nothing_is_done(out, was_there)
        raise
    return manifest, num_found


def _check_settings(settings: BuildSettings) -> None:
    frame_tokens = settings.frame_tokens
    if frame_tokens < 64 or frame_tokens & (frame_tokens - 1) or frame_tokens > 1 << 24:
        raise ConfigError(
            f"--frame-tokens is {frame_tokens}; it must be a power of two from 64 to 16777216"
        )
    if not 0.0 <= settings.val_fraction < 1.0:
        raise ConfigError(
            f"--val-fraction is {settings.val_fraction}; it must be at least 0 and below 1"
        )


def _claim_folder(out: Path, settings: BuildSettings) -> None:
    """Make the folder ours, or find that it already is and was begun with the same settings."""
    settings_path = out / BUILD_FOLDER / _SETTINGS_NAME
    if settings_path.exists():
        try:
            earlier = BuildSettings(**json.loads(settings_path.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise OutputExistsError(
                f"{out} was begun by another version of megaback, or {settings_path} is broken "
                f"({error}); choose another --out, or remove that folder"
            ) from None
        _require_same_settings(earlier, settings, out)
    elif out.exists() and (not out.is_dir() or _holds_something_else(out)):
        raise OutputExistsError(
            f"{out} already holds something that is no build of shards; choose another --out"
        )
    (out / BUILD_FOLDER).mkdir(parents=True, exist_ok=True)
    write_text(settings_path, json.dumps(asdict(settings), indent=2) + "\n")


def _holds_something_else(out: Path) -> bool:
    """An empty build folder is ours: a build was stopped before it could write its settings."""
    ours = out / BUILD_FOLDER
    others = [path for path in out.iterdir() if path != ours]
    begun = list(ours.iterdir()) if ours.is_dir() else []
    return bool(others) or any(not path.name.startswith(f".{_SETTINGS_NAME}.") for path in begun)


def _require_same_settings(earlier: BuildSettings, now: BuildSettings, out: Path) -> None:
    if earlier.tokenizer_sha256 != now.tokenizer_sha256:
        raise TokenizerMismatchError(
            f"{out} holds shards of tokenizer {earlier.tokenizer_sha256[:12]}, not of the given "
            f"tokenizer {now.tokenizer_sha256[:12]}; choose another --out or that tokenizer"
        )
    for name in ("direction", "unit"):
        if getattr(earlier, name) != getattr(now, name):
            raise DirectionMismatchError(
                f"{out} holds shards with {name} {getattr(earlier, name)!r}, not "
                f"{getattr(now, name)!r}; choose another --out"
            )
    if not (same_source(earlier, now) and same_but_source(earlier, now)):
        raise OutputExistsError(
            f"{out} holds shards of {earlier.source} with other settings; choose another --out, "
            "or remove that folder"
        )


def _run(
    tasks: list[Task], out: Path, model_bytes: bytes, workers: int
) -> Iterator[tuple[Task, TaskRecord]]:
    if not tasks:
        return
    # Spawned, not forked: a fork copies the locks of whatever threads a library has started.
    pool = ProcessPoolExecutor(
        min(workers, len(tasks)), mp_context=get_context("spawn"), initializer=_end_with_parent
    )
    columns = (*Progress.get_default_columns(), TimeElapsedColumn())
    try:
        console = Console(stderr=True)
        # Without a terminal, a bar would leave an empty line behind.
        with Progress(
            *columns, console=console, transient=True, disable=not console.is_terminal
        ) as progress:
            bar = progress.add_task("tasks", total=len(tasks))
            running = {pool.submit(run_task, task, out, model_bytes): task for task in tasks}
            for future in as_completed(running):
                yield running[future], future.result()
                progress.advance(bar)
    except BrokenProcessPool:
        raise LaunchError(
            "a worker was killed from outside (out of memory, perhaps); "
            "run the same command again, with fewer --workers, to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """End this worker when the build is killed: it would wait for tasks for ever."""
    parent = parent_process()
    if parent is not None:
        Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _finalize(
    settings: BuildSettings, codec: TextCodec, records: list[TaskRecord], out: Path
) -> Manifest:
    manifest = Manifest(
        text_format=codec.format,
        vocab_size=codec.vocab_size,
        begin_id=codec.begin_id,
        end_id=codec.end_id,
        id_bytes=codec.id_dtype.itemsize,
        frame_tokens=settings.frame_tokens,
        source=settings.source,
        val_fraction=settings.val_fraction,
        empty_documents=sum(record.empty_documents for record in records),
        shards=tuple(
            sorted(
                (shard for record in records for shard in record.shards),
                key=lambda shard: shard.file,
            )
        ),
    )
    if not manifest.split("train"):
        for index in range(len(records)):
            (out / BUILD_FOLDER / f"task-{index:05d}.json").unlink()  # not worth keeping
        raise SourceEmptyError(
            f"the source {settings.source} holds no text to train on "
            f"({manifest.empty_documents} empty documents, "
            f"{manifest.total('val')['documents']} in the val set); give a source with text"
        )
    _remove_all_but(out, {shard.file for shard in manifest.shards})
    with replacing(out / TOKENIZER_NAME) as file:
        file.write(codec.model_bytes)
    manifest.save(out)
    return manifest


def _remove_all_but(out: Path, names: set[str]) -> None:
    """Remove the shards left by a killed process, or by slices that have changed."""
    for path in [*out.glob("*.zst"), *out.glob(".*.partial")]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _forget_if_nothing_is_done(out: Path, was_there: bool) -> None:
    """After a failure, leave no trace unless some task's work is worth keeping."""
    if (out / MANIFEST_NAME).exists() or any((out / BUILD_FOLDER).glob("task-*.json")):
        return
    _remove_all_but(out, set())
    shutil.rmtree(out / BUILD_FOLDER, ignore_errors=True)
    if not was_there:
        shutil.rmtree(out, ignore_errors=True)


@click.command(cls=Command, name="build")
@click.option("--source", required=True, help="pydocs, a path or glob, or hf:NAME[:CONFIG].")
@click.option("--tokenizer", required=True, type=click.Path(path_type=Path), help="tokenizer.model")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="Folder to write.")
@click.option(
    "--direction",
    type=click.Choice([direction.value for direction in Direction]),
    default=Direction.BACKWARD.value,
    show_default=True,
)
@click.option(
    "--unit",
    type=click.Choice([unit.value for unit in Unit]),
    default=Unit.TOKEN.value,
    show_default=True,
    help="What is reversed: ids, or words before encoding.",
)
@click.option("--workers", type=click.IntRange(min=1), help="Processes; default: every core.")
@click.option("--val-fraction", type=float, default=0.01, show_default=True)
@click.option(
    "--text-column", default="text", show_default=True, help="Column or key with the text."
)
@click.option("--frame-tokens", type=int, default=DEFAULT_FRAME_TOKENS, show_default=True)
@click.option("--compression-level", type=click.IntRange(1, 22), default=3, show_default=True)
def main(
    source: str,
    tokenizer: Path,
    out: Path,
    direction: str,
    unit: str,
    workers: int | None,
    val_fraction: float,
    text_column: str,
    frame_tokens: int,
    compression_level: int,
) -> None:
    """Encode a source into compressed shards of (reversed) tokens."""
    codec = TextCodec.load(tokenizer, Direction(direction), Unit(unit))
    settings = BuildSettings(
        source=source,
        tokenizer_sha256=codec.format.tokenizer_sha256,
        direction=direction,
        unit=unit,
        val_fraction=val_fraction,
        frame_tokens=frame_tokens,
        compression_level=compression_level,
        text_column=text_column,
    )
    manifest, num_found = build_shards(
        settings, codec, out, workers or len(os.sched_getaffinity(0))
    )
    if num_found:
        click.echo(f"{num_found} tasks were already done")
    for split in ("train", "val"):
        total = manifest.total(split)
        click.echo(
            f"{split}: {total['documents']:,} documents, {total['tokens']:,} tokens, "
            f"{total['text_bytes']:,} bytes of text in {total['shards']} shards "
            f"of {total['file_bytes']:,} bytes"
        )
    if manifest.empty_documents:
        click.echo(f"left out: {manifest.empty_documents:,} empty documents")
    if not manifest.split("val"):
        click.echo(
            "the val set is empty: raise --val-fraction or add documents to measure val loss"
        )
    click.echo(f"fingerprint {manifest.fingerprint[:16]} in {out}")
    click.echo(f"next: megaback train configs/demo.yaml data.shards={out}")


if __name__ == "__main__":
    main()
