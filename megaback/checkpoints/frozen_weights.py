"""Frozen weights of a run with LoRA: one file, which all checkpoints of the run share.

It is beside the checkpoints, and each has a hard link to it, so that a checkpoint is whole, and
costs the space of the adapters and their optimizer state. File systems without hard links have
copies.
"""

import os
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.common.atomic import partial_file
from data_pipeline.errors import CheckpointCorruptError, RunMismatchError
from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.checkpoints.safetensors_file import SizeAndHash, TensorFile, write_tensors
from megaback.faults.start_fence import NO_FENCE, Fence
from megaback.run_folder import CHECKPOINTS_FOLDER, FROZEN_NAME


def write_frozen(
    run: Path,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
    fence: Fence = NO_FENCE,
) -> SizeAndHash:
    """Write the frozen weights of a new run, in fp32. Raises OSError."""
    path = run / CHECKPOINTS_FOLDER / FROZEN_NAME
    path.parent.mkdir(exist_ok=True)
    specs = {name: (torch.float32, shape) for name, shape in shapes.items()}
    with partial_file(path, fence.replace, fence.start_id) as partial:
        return write_tensors(partial, specs, read)


def keep_frozen(run: Path, target: Path, meta: CheckpointMeta, fence: Fence) -> SizeAndHash:
    """Use the frozen weights of a verified checkpoint for a run's next ones. Raises OSError."""
    path = run / CHECKPOINTS_FOLDER / FROZEN_NAME
    path.parent.mkdir(exist_ok=True)
    link_frozen(target / FROZEN_NAME, path, fence)
    return meta.files[FROZEN_NAME]


def link_frozen(source: Path, path: Path, fence: Fence = NO_FENCE) -> None:
    """Link a file, or copy it where that is not possible. Raises OSError."""
    with partial_file(path, fence.replace, fence.start_id) as partial:
        try:
            os.link(source, partial)
        except OSError:
            shutil.copyfile(source, partial)


def open_frozen(target: Path, meta: CheckpointMeta) -> TensorFile:
    """The frozen weights of a verified checkpoint. Raises RunMismatchError if it has none."""
    if FROZEN_NAME not in meta.files:
        raise RunMismatchError(
            f"{target} has no frozen weights, as its run trained all of them; use "
            f"init_from={target} to train updates of its weights"
        )
    return TensorFile(target / FROZEN_NAME)


def require_shapes(target: Path, frozen: TensorFile, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise CheckpointCorruptError unless a checkpoint's frozen weights have these shapes."""
    if {name: entry.shape for name, entry in frozen.entries.items()} != dict(shapes):
        raise CheckpointCorruptError(
            f"{FROZEN_NAME} of the checkpoint {target} does not match the model of its config; use "
            "another one"
        )
