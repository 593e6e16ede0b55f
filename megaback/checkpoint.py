"""Checkpoints that are whole or absent.

A checkpoint is a folder `step-00000100` of DeepSpeed's files and the tokenizer. It is complete only
once `meta.json` stands in it: written last, atomically, after every rank has written its part, with
the size and SHA-256 of every file. Nothing is loaded before it is verified, and DeepSpeed's files
hold pickles, so load only checkpoints that you trust.
"""

import hashlib
import json
import platform
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import asdict, dataclass, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import TypeAdapter

from data_pipeline.command import replacing, write_text
from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    RunMismatchError,
    StorageError,
)
from data_pipeline.manifest import TOKENIZER_NAME
from data_pipeline.text import TextFormat
from megaback.distributed import World

CHECKPOINTS_FOLDER = "checkpoints"
META_NAME = "meta.json"
_FORMAT_NAME = "megaback-checkpoint"
_FORMAT_VERSION = 1
_STEP_FOLDER = re.compile(r"step-\d{8}")


@dataclass(frozen=True)
class CheckpointMeta:
    """What a checkpoint is: everything that is needed to continue it or to use it elsewhere."""

    step: int
    world_size: int
    zero_stage: int
    precision: str
    vocab_size: int
    text_format: dict[str, str]
    data_fingerprint: str
    config: dict[str, Any]
    val_loss: float | None
    versions: dict[str, str]
    files: dict[str, tuple[int, str]]
    """name: (bytes, sha256)"""

    @property
    def format(self) -> TextFormat:
        return TextFormat.from_dict(self.text_format)


def library_versions() -> dict[str, str]:
    """Versions of what decides the numbers."""
    import deepspeed

    from megaback import __version__

    return {
        "megaback": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "numpy": np.__version__,
    }


def save_checkpoint(
    engine: Any, run: Path, meta: CheckpointMeta, tokenizer: bytes, world: World, keep_last: int
) -> Path:
    """Write a checkpoint together with all ranks, then let the oldest ones go.

    When a rank cannot write, all ranks stop with its message; the checkpoint then has no meta.json
    and is never used.
    """
    folder = run / CHECKPOINTS_FOLDER
    target = folder / f"step-{meta.step:08d}"
    if any(world.gather(world.together(_is_saved, target, world))):
        return target
    world.together(_make_empty, target, world)
    with _collecting_write_errors(engine) as problems:
        engine.save_checkpoint(str(folder), tag=target.name, save_latest=False)
    world.stop_if_any(_write_error(target, problems))
    world.together(_add_tokenizer, target, tokenizer, world)
    names = sorted(path.name for path in target.iterdir())
    mine = {name: _size_and_hash(target / name) for name in names[world.rank :: world.size]}
    files = {name: entry for part in world.gather(mine) for name, entry in part.items()}
    world.together(_complete, target, replace(meta, files=dict(sorted(files.items()))), world)
    if world.is_first:
        _rotate(folder, keep_last)
    return target


def _is_saved(target: Path, world: World) -> bool:
    """Whether this step was saved before, and is intact. Only the first rank looks."""
    if not world.is_first or not (target / META_NAME).is_file():
        return False
    try:
        verify_files(target, read_meta(target))
    except CheckpointCorruptError:
        return False  # it is written again
    return True


def _make_empty(target: Path, world: World) -> None:
    if world.is_first:
        (target / META_NAME).unlink(missing_ok=True)
        shutil.rmtree(target, ignore_errors=True)
        target.mkdir(parents=True, exist_ok=True)


def _add_tokenizer(target: Path, tokenizer: bytes, world: World) -> None:
    if world.is_first:
        for script in target.parent.glob("zero_to_*.py"):
            script.unlink()  # `megaback convert` takes the place of DeepSpeed's copied script
        with replacing(target / TOKENIZER_NAME) as file:
            file.write(tokenizer)


def _complete(target: Path, meta: CheckpointMeta, world: World) -> None:
    if world.is_first:
        fields = {"format": _FORMAT_NAME, "version": _FORMAT_VERSION, **asdict(meta)}
        write_text(target / META_NAME, json.dumps(fields, indent=2) + "\n")
        write_text(target.parent / "latest", target.name + "\n")


@contextmanager
def _collecting_write_errors(engine: Any) -> Iterator[list[Exception]]:
    """Let DeepSpeed's save run to its end on every rank, and keep what went wrong.

    A rank that raised in the middle would leave the others waiting in DeepSpeed's barriers.
    """
    problems: list[Exception] = []
    writer = engine.checkpoint_engine
    write = writer.save

    def save(*arguments: Any, **options: Any) -> Any:
        try:
            return write(*arguments, **options)
        except (OSError, RuntimeError) as error:  # torch's writer reports a full disk as the latter
            problems.append(error)
            return None

    writer.save = save
    try:
        yield problems
    finally:
        writer.save = write


def _write_error(target: Path, problems: list[Exception]) -> StorageError | None:
    if not problems:
        return None
    reason = " ".join(str(problems[0]).split())
    return StorageError(
        f"cannot write the checkpoint {target}: {reason}; the checkpoints before it are intact: "
        "free some space and run the same command to go on"
    )


def newest_checkpoint(run: Path, world: World) -> tuple[Path, CheckpointMeta] | None:
    """The newest checkpoint of a run that verifies; None if there never was a complete one.

    Every rank hashes a part of the files and all ranks return the same. Raises
    CheckpointCorruptError if there are complete checkpoints and none of them verifies.
    """
    seen = world.together(complete_checkpoints, run)
    found = world.gather(seen)[0]  # a shared disk may show the ranks different things for a while
    problems: list[str] = []
    for target in reversed(found):
        meta, problem = None, None
        try:
            meta = read_meta(target)
            verify_files(target, meta, world.rank, world.size)
        except (CheckpointCorruptError, OSError) as error:
            problem = str(error)
        reported = [text for text in world.gather(problem) if text]
        if not reported and meta is not None:
            if world.is_first and problems:
                print(f"megaback: {problems[0]}; going back to {target.name}", flush=True)
            return target, meta
        problems.extend(reported)
    if problems:
        raise CheckpointCorruptError(
            f"{problems[0]}; no other checkpoint of {run} verifies, so the run cannot go on: "
            "restore one, or start again in another run folder"
        )
    return None


def load_into_engine(engine: Any, target: Path, meta: CheckpointMeta, world: World) -> None:
    """Restore weights and optimizer of a verified checkpoint on every rank.

    Raises RunMismatchError for another number of ranks, ZeRO stage or precision.
    """
    now = (world.size, engine.zero_optimization_stage())
    if now != (meta.world_size, meta.zero_stage):
        raise RunMismatchError(
            f"{target} was saved by {meta.world_size} ranks at ZeRO stage {meta.zero_stage}, and "
            f"this run has {now[0]} ranks at stage {now[1]}; use the same, or take its weights "
            f"with `megaback convert {target} --to full --out DIR` and init_from=DIR"
        )
    with redirect_stderr(StringIO()):  # DeepSpeed draws a progress bar for every rank
        path, _ = engine.load_checkpoint(str(target.parent), tag=target.name)
    if path is None:
        raise CheckpointCorruptError(f"DeepSpeed found nothing to load in {target}")


def complete_checkpoints(run: Path) -> list[Path]:
    """The complete checkpoints of a run, oldest first."""
    return sorted(
        path.parent
        for path in (run / CHECKPOINTS_FOLDER).glob(f"step-*/{META_NAME}")
        if _STEP_FOLDER.fullmatch(path.parent.name)
    )


def find_checkpoint(path: Path) -> tuple[Path, CheckpointMeta]:
    """The verified checkpoint that a path means: a run, its checkpoints, or one step's folder.

    Raises CheckpointMissingError or CheckpointCorruptError.
    """
    if (path / META_NAME).is_file():
        candidates = [path]
    else:
        run = path.parent if path.name == CHECKPOINTS_FOLDER else path
        candidates = complete_checkpoints(run)
    if not candidates:
        raise CheckpointMissingError(
            f"{path} holds no complete checkpoint (no step-*/{META_NAME}); "
            "give a run's folder, or train until a checkpoint is saved"
        )
    newest = candidates[-1]
    try:
        meta = read_meta(newest)
        verify_files(newest, meta)
    except CheckpointCorruptError as error:
        others = ", ".join(other.name for other in candidates[:-1]) or "there is no other one"
        raise CheckpointCorruptError(
            f"{error}; name an older checkpoint, if you want that one ({others})"
        ) from None
    return newest, meta


def read_meta(target: Path) -> CheckpointMeta:
    """Raises CheckpointCorruptError when meta.json is not one of this version."""
    try:
        fields = json.loads((target / META_NAME).read_text(encoding="utf-8"))
        if (fields.pop("format"), fields.pop("version")) != (_FORMAT_NAME, _FORMAT_VERSION):
            raise ValueError("another format or version")
        meta = TypeAdapter(CheckpointMeta).validate_python(fields)
        _ = meta.format
        if target.name != f"step-{meta.step:08d}" and _STEP_FOLDER.fullmatch(target.name):
            raise ValueError(f"it is of step {meta.step}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = " ".join(str(error).split())
        raise CheckpointCorruptError(
            f"{target / META_NAME} is not a checkpoint's description ({reason})"
        ) from None
    return meta


def verify_files(target: Path, meta: CheckpointMeta, part: int = 0, parts: int = 1) -> None:
    """Compare sizes and hashes of every `parts`-th file. Raises CheckpointCorruptError."""
    for name in sorted(meta.files)[part::parts]:
        path = target / name
        expected = meta.files[name]
        found = _size_and_hash(path) if path.is_file() else None
        if found != expected:
            what = "is missing" if found is None else "is not the file that was saved"
            raise CheckpointCorruptError(f"the checkpoint {target} is damaged: {name} {what}")


def _rotate(folder: Path, keep_last: int) -> None:
    for old in complete_checkpoints(folder.parent)[:-keep_last]:
        (old / META_NAME).unlink()
    for path in folder.iterdir():  # those, and what kills have left behind
        if _STEP_FOLDER.fullmatch(path.name) and not (path / META_NAME).exists():
            shutil.rmtree(path, ignore_errors=True)


def _size_and_hash(path: Path) -> tuple[int, str]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return path.stat().st_size, digest.hexdigest()
