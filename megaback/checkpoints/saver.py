"""Asynchronous saving of checkpoints.

A save copies this rank's state to host memory, and a thread writes it to disk while training
continues. Once all ranks have written, which they agree on between steps, the first rank completes
the checkpoint with `meta.json` and deletes old ones. Until it is whole, a part has the ID of its
start in its name, and nothing is renamed or deleted once a newer start has begun (`start_fence`).
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from threading import Thread

from torch import Tensor

from data_pipeline.common.atomic import partial_file, replacing, write_text
from data_pipeline.common.command import storage_error
from data_pipeline.common.own_files import remove_own_files
from data_pipeline.errors import CheckpointCorruptError, StorageError
from data_pipeline.text.tokenizer import file_name_of
from megaback.checkpoints.checkpoint import CheckpointMeta, complete, read_meta, verify_together
from megaback.checkpoints.frozen_weights import link_frozen
from megaback.checkpoints.host_copy import HostCopy
from megaback.checkpoints.safetensors_file import SizeAndHash, size_and_hash, write_tensors
from megaback.checkpoints.saved_runs import WEIGHT, part_names
from megaback.config_operation import CheckpointSection
from megaback.distributed.world import World
from megaback.faults.start_fence import NO_FENCE, Fence
from megaback.run_folder import (
    BEST_NAME,
    CHECKPOINT_FILE,
    CHECKPOINTS_FOLDER,
    FROZEN_NAME,
    LATEST_NAME,
    META_NAME,
    STEP_FOLDER,
    complete_checkpoints,
    meant_by,
    step_name,
    step_of,
)


class CheckpointSaver:
    """Writer of a run's checkpoints, one at a time."""

    def __init__(
        self,
        run: Path,
        tokenizer: bytes,
        section: CheckpointSection,
        world: World,
        fence: Fence = NO_FENCE,
        pinned_steps: frozenset[int] = frozenset(),
        frozen: SizeAndHash | None = None,
    ) -> None:
        """`pinned_steps`: steps whose checkpoints are never deleted; `frozen`: size and hash of the
        frozen weights beside the checkpoints, which each of them contains."""
        self._pinned_steps = pinned_steps
        self._frozen = frozen if world.is_first else None
        self._folder = run / CHECKPOINTS_FOLDER
        self._tokenizer = tokenizer
        self._section = section
        self._world, self._fence = world, fence
        self._host: HostCopy | None = None
        self._open: _Writing | None = None
        self._completed: Path | None = None

    def take_completed(self) -> Path | None:
        """The newest checkpoint completed since the last call, or None."""
        completed, self._completed = self._completed, None
        return completed

    @property
    def is_open(self) -> bool:
        """Whether a checkpoint was begun and is not complete: the same on every rank."""
        return self._open is not None

    @property
    def is_writing(self) -> bool:
        """Whether this rank is still writing."""
        return self._open is not None and self._open.is_alive()

    def begin(
        self,
        state: Mapping[str, Tensor],
        meta: CheckpointMeta,
        run: Path | None = None,
        *,
        is_best: bool = False,
    ) -> None:
        """Complete the open checkpoint, then copy this rank's state and start to write it.

        Collective. The best checkpoint is named in `best`, and kept until another one is best. If a
        rank cannot write, all ranks exit with its error. `run`: the run's current folder.
        """
        self.finish()
        if run is not None:
            self._folder = run / CHECKPOINTS_FOLDER
        world = self._world
        target = self._folder / step_name(meta.step)
        is_complete = world.of_first((target / META_NAME).is_file(), bool)
        if is_complete and not verify_together(target, world)[1]:
            return  # otherwise it is written again
        self._fence.check()
        world.run_collectively(_make_empty, target, world)
        copy = self._copied(state)
        writing = _Writing(target, meta, copy, world.rank, self._fence, is_best=is_best)
        writing.frozen = self._frozen
        self._open = writing
        self._open.start()
        if not self._section.background:
            self.finish()

    def finish(self) -> None:
        """Wait for all ranks, and complete the open checkpoint. Collective."""
        writing, world = self._open, self._world
        if writing is None:
            return
        writing.join()
        self._open = None
        world.stop_if_any(writing.error)
        files = {
            name: entry
            for part in world.gather(writing.files, dict[str, SizeAndHash])
            for name, entry in part.items()
        }
        world.run_collectively(self._complete, writing, files)
        self._completed = writing.target

    def _complete(self, writing: "_Writing", files: dict[str, SizeAndHash]) -> None:
        if not self._world.is_first:
            return
        target, publish = writing.target, self._fence.replace
        tokenizer = target / file_name_of(self._tokenizer)
        with replacing(tokenizer, publish) as file:
            file.write(self._tokenizer)
        files = {**files, tokenizer.name: size_and_hash(tokenizer)}
        complete(target, writing.meta, files, publish)
        write_text(target.parent / LATEST_NAME, target.name + "\n", publish)
        if writing.is_best:
            write_text(target.parent / BEST_NAME, target.name + "\n", publish)
        rotate(self._folder, self._section, self._fence, self._pinned_steps)

    def _copied(self, state: Mapping[str, Tensor]) -> HostCopy:
        if self._host is None or self._host.keys() != state.keys():
            if self._host is not None:
                self._host.release()
                self._host = None  # before the next one is allocated
            self._host = HostCopy(state)
        self._host.fill(state)
        return self._host


class _Writing(Thread):
    """Thread that writes a rank's part of a checkpoint."""

    def __init__(
        self,
        target: Path,
        meta: CheckpointMeta,
        tensors: Mapping[str, Tensor],
        rank: int,
        fence: Fence = NO_FENCE,
        *,
        is_best: bool,
    ) -> None:
        super().__init__(name="checkpoint", daemon=True)
        self._fence = fence
        self.is_best = is_best
        self.target, self.meta = target, meta
        self.files: dict[str, SizeAndHash] = {}
        self.error: StorageError | None = None
        self.frozen: SizeAndHash | None = None
        weights = [key for key in tensors if key.startswith(WEIGHT + ":")]
        others = [key for key in tensors if not key.startswith(WEIGHT + ":")]
        self._tensors = tensors
        self._parts = dict(zip(part_names(rank), (weights, others), strict=True))

    def run(self) -> None:
        try:
            if self.frozen is not None:
                path = self.target / FROZEN_NAME
                link_frozen(self.target.parent / FROZEN_NAME, path, self._fence)
                self.files[FROZEN_NAME] = self.frozen
            for name, keys in self._parts.items():
                specs = {key: (self._tensors[key].dtype, self._tensors[key].shape) for key in keys}
                fence = self._fence
                fence.check()
                with partial_file(self.target / name, fence.replace, fence.start_id) as partial:
                    self.files[name] = write_tensors(partial, specs, self._tensors.__getitem__)
        except Exception as error:  # noqa: BLE001 (any error leaves the checkpoint incomplete)
            reason = f"{type(error).__name__}: {error}; run the same command again"
            if isinstance(error, OSError):
                reason = str(storage_error(error)).removesuffix(".")  # includes advice
            self.error = StorageError(
                f"cannot write the checkpoint {self.target}: {reason}; earlier checkpoints are "
                "intact, and the run resumes from them"
            )


def rotate(
    folder: Path,
    section: CheckpointSection,
    fence: Fence = NO_FENCE,
    pinned_steps: frozenset[int] = frozenset(),
) -> None:
    """Delete old and incomplete checkpoints.

    Kept are the last `keep_last`, every `keep_every_steps`, those of `pinned_steps`, the last
    finite one and the best.

    A checkpoint's meta.json is deleted first. Symbolic links to other checkpoints, and files that
    are not part of a checkpoint, are kept.
    """
    complete = complete_checkpoints(folder.parent)
    kept = set(complete[-section.keep_last :])
    with suppress(CheckpointCorruptError):  # it names no checkpoint
        kept.add(meant_by(folder / BEST_NAME))
    for target in complete[: -section.keep_last]:
        step = step_of(target)
        if step in pinned_steps:
            kept.add(target)
        if section.keep_every_steps is not None and step % section.keep_every_steps == 0:
            kept.add(target)
    finite = next((target for target in reversed(complete) if _is_finite(target)), None)
    for old in complete:
        if old not in kept and old != finite and not old.is_symlink():
            fence.check()
            (old / META_NAME).unlink()
    for path in folder.iterdir():
        if STEP_FOLDER.fullmatch(path.name) and not (path / META_NAME).exists():
            fence.check()
            remove_own_files(path, CHECKPOINT_FILE)


def _is_finite(target: Path) -> bool:
    try:
        return read_meta(target).is_finite
    except CheckpointCorruptError:
        return False


def _make_empty(target: Path, world: World) -> None:
    if world.is_first:
        if target.is_symlink():  # another run's checkpoint, which must not be changed
            target.unlink()
        (target / META_NAME).unlink(missing_ok=True)
        remove_own_files(target, CHECKPOINT_FILE)
        target.mkdir(parents=True, exist_ok=True)
