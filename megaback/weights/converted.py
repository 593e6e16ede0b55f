"""Automatic conversion of a run or checkpoint into a model folder, cached in the run.

A checkpoint is converted once, into `converted/STEP-CONTENT` of its run, and reused from there. The
folder appears atomically. Each checkpoint has its own; those of deleted checkpoints are removed
after a while.
"""

import atexit
import errno
import hashlib
import logging
import os
import shutil
import tempfile
import time
from contextlib import suppress
from pathlib import Path

import torch

from data_pipeline.common.atomic import partial_name, whole_name
from data_pipeline.common.locks import locked
from data_pipeline.common.own_files import holds_only, remove_own_files
from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError
from megaback.run_folder import (
    CHECKPOINTS_FOLDER,
    CONVERSION,
    CONVERSION_FILE,
    CONVERTED_FOLDER,
    LOCK_NAME,
    META_NAME,
    MODEL_CONFIG_NAME,
    checkpoints_meant_by,
    complete_checkpoints,
    refuse_unreadable_model,
)
from megaback.weights.model_folder import write_model_folder
from megaback.weights.source import open_checkpoint

_LOG = logging.getLogger("megaback.weights")
_MAX_FILE_BYTES = 5 * 10**9
_MAX_TRIES = 5
"""Number of tries: a training run may delete the checkpoint that is being read."""
_KEPT_S = 3600.0
"""Minimum time since a conversion was last used before it is removed, in seconds."""
_NOT_WRITABLE = (errno.EACCES, errno.EPERM, errno.EROFS)


def model_folder(path: str | Path) -> Path:
    """Model folder for a path: a model's folder, a run (its newest checkpoint) or a checkpoint.

    The checkpoint is logged. Raises CheckpointMissingError, CheckpointCorruptError.
    """
    path = Path(path)
    if (path / MODEL_CONFIG_NAME).is_file():
        return path
    if not path.exists():
        raise CheckpointMissingError(
            f"{path} does not exist; give a run, one of its checkpoints, or a folder written by "
            "`megaback convert`"
        )
    for _ in range(_MAX_TRIES):
        target = _checkpoint_of(path)
        try:
            return _converted(path, target)
        except (CheckpointCorruptError, CheckpointMissingError, FileNotFoundError):
            if (target / META_NAME).is_file():
                raise
    raise CheckpointMissingError(
        f"the checkpoints of {path} are deleted faster than they can be read; raise "
        "checkpoint.keep_last, or name one that is kept"
    )


def shown_name(folder: Path) -> str:
    """Name of a model: that of its folder, or of the run that it was converted from."""
    folder = folder.resolve()
    if folder.parent.name == CONVERTED_FOLDER:
        return folder.parent.parent.name
    return folder.name


def _checkpoint_of(path: Path) -> Path:
    """The checkpoint of a path, unverified. Raises CheckpointMissingError."""
    found = checkpoints_meant_by(path)
    if not found:
        refuse_unreadable_model(path)
        raise CheckpointMissingError(
            f"{path} is neither a model's folder (it has no {MODEL_CONFIG_NAME}) nor a run with a "
            f"complete checkpoint (no step-*/{META_NAME}); name another folder, or train until a "
            "checkpoint is saved"
        )
    return found[-1]


def _converted(path: Path, target: Path) -> Path:
    """Folder of the converted checkpoint, reused or created."""
    of_run = target.parent.name == CHECKPOINTS_FOLDER
    beside = (target.parent.parent if of_run else target.parent) / CONVERTED_FOLDER
    folder = beside / f"{target.name}-{_content(target)}"
    what = f"{path}: {target.name}"
    if (folder / MODEL_CONFIG_NAME).is_file():
        with suppress(OSError):
            os.utime(folder)
        _LOG.info("%s, already converted to %s", what, folder)
        return folder
    try:
        if beside.is_symlink():  # the run may be untrusted, and the link point anywhere
            raise PermissionError(errno.EACCES, "it is a link", str(beside))
        with locked(beside / LOCK_NAME):  # a second process reuses the first one's conversion
            if not (folder / MODEL_CONFIG_NAME).is_file():
                _write(target, folder)
            _remove_old(beside, folder)
    except OSError as error:
        if error.errno not in _NOT_WRITABLE:
            raise
        temporary = Path(tempfile.mkdtemp(prefix="megaback-"))
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        folder = temporary / target.parents[1 if of_run else 0].resolve().name
        _write(target, folder)
        what = f"{what} ({beside} cannot be written)"
    _LOG.info("%s, converted to %s", what, folder)
    return folder


def _content(target: Path) -> str:
    """Digest of a checkpoint's meta.json, which has the hashes of its files."""
    return hashlib.sha256((target / META_NAME).read_bytes()).hexdigest()[:12]


def _write(target: Path, folder: Path) -> None:
    source = open_checkpoint(target)
    partial = folder.with_name(partial_name(folder.name))
    try:
        partial.mkdir(parents=True)
        specs = source.specs(torch.float32)
        write_model_folder(
            partial, source.description, specs, source.read, source.tokenizer, _MAX_FILE_BYTES
        )
        with suppress(FileExistsError, IsADirectoryError):
            _rename(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _rename(partial: Path, folder: Path) -> None:
    """Rename a folder. Raises FileExistsError if another process, without locks, was faster."""
    try:
        os.replace(partial, folder)
    except OSError as error:
        if error.errno == errno.ENOTEMPTY:
            raise FileExistsError(errno.EEXIST, "it is there", str(folder)) from None
        raise


def _remove_old(beside: Path, current: Path) -> None:
    """Remove conversions of deleted checkpoints, and incomplete ones.

    A conversion with additional files is kept.
    """
    known = {target.name for target in complete_checkpoints(beside.parent)}
    for folder in beside.iterdir():
        is_partial = CONVERSION.fullmatch(whole_name(folder.name) or "") is not None
        is_old = CONVERSION.fullmatch(folder.name) is not None and folder != current
        with suppress(OSError):
            if (
                (is_partial or (is_old and folder.name.rpartition("-")[0] not in known))
                and time.time() - folder.stat().st_mtime > _KEPT_S
                and holds_only(folder, CONVERSION_FILE)
            ):
                remove_own_files(folder, CONVERSION_FILE)
