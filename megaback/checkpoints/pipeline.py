"""Checkpoint pipeline: write to disk, complete, and copy to `checkpoint.copy_to`.

All stages run concurrently with training. `advance` is called between steps, with values that the
ranks have agreed on, and never waits; `drain` waits for the remaining work at the end.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import sleep
from typing import Any

from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.checkpoints.remote_copy import CheckpointCopier
from megaback.checkpoints.safetensors_file import SizeAndHash
from megaback.checkpoints.saver import CheckpointSaver
from megaback.checkpoints.state import named_state, saved_index
from megaback.config_operation import CheckpointSection
from megaback.distributed.world import World
from megaback.faults.watchdog import Watchdog

_POLL_S = 0.02


class CheckpointPipeline:
    """Checkpoint pipeline of a training run. Methods are collective, properties are not."""

    def __init__(
        self,
        run: Path,
        tokenizer: bytes,
        section: CheckpointSection,
        world: World,
        watchdog: Watchdog,
        log: Callable[[str], None],
        pinned_steps: frozenset[int] = frozenset(),
        frozen: SizeAndHash | None = None,
    ) -> None:
        """`log` receives messages for the user; `pinned_steps`, `frozen`: as of CheckpointSaver.

        Ends all ranks for an invalid `copy_to`.
        """
        self.folder = run
        """The run's folder at the last save."""
        self._world, self._watchdog, self.log = world, watchdog, log
        fence = watchdog.fence
        self._copier = world.run_collectively(CheckpointCopier, run, section, world, fence)
        self._saver = CheckpointSaver(run, tokenizer, section, world, fence, pinned_steps, frozen)

    @property
    def is_writing(self) -> bool:
        """Whether this rank is writing a checkpoint."""
        return self._saver.is_writing

    @property
    def is_copying(self) -> bool:
        """Whether this rank is copying a checkpoint."""
        return self._copier.is_copying

    def save(self, engine: Any, meta: CheckpointMeta, *, is_best: bool = False) -> None:
        """Finish the previous checkpoint, then begin this one, in the run's current folder.

        Ends all ranks if one cannot write.
        """
        world = self._world
        self.finish_writing(meta.step)
        self._watchdog.set_phase("saving", meta.step)
        state = named_state(engine, world.rank, world.size)
        if world.is_first:  # which writes it
            meta = replace(meta, runs=saved_index(engine, world.size))
        folder = world.of_first(world.run_collectively(self._watchdog.folder), Path)
        if folder != self.folder:
            self.folder = folder
            self.log(f"the run's folder is now {folder}: checkpoints are written there")
        self._saver.begin(state, meta, folder, is_best=is_best)

    def advance(self, *, is_writing: bool, is_copying: bool) -> None:
        """Complete what all ranks have finished, and begin to copy the completed checkpoint.

        The arguments are the properties' values combined over all ranks, the same on each.
        """
        if self._copier.is_open and not is_copying:
            self._copier.finish(self.log)
        if self._saver.is_open and not is_writing:
            self._saver.finish()
        if not self._copier.is_open:
            self._copier.begin(self._saver.take_completed())

    def finish_writing(self, step: int) -> None:
        """Wait for the checkpoint that is being written, if any, and complete it."""
        self._wait_while(lambda: self.is_writing, "writing a checkpoint", step)
        self._saver.finish()

    def drain(self, step: int) -> None:
        """Wait until everything is written, complete and copied."""
        self.finish_writing(step)
        for _ in range(2):  # the copy in progress, then that of the last checkpoint
            self._wait_while(lambda: self.is_copying, "copying a checkpoint", step)
            self._copier.finish(self.log)
            self._copier.begin(self._saver.take_completed())

    def _wait_while(self, is_busy: Callable[[], bool], phase: str, step: int) -> None:
        """Wait until no rank is busy; the repeated phase keeps the watchdog from timing out."""
        while self._world.sum(is_busy())[0]:
            self._watchdog.set_phase(phase, step)
            sleep(_POLL_S)
