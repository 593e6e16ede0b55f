"""Fetching of a checkpoint from its copy in `checkpoint.copy_to`, each rank a part of its files.

A run that has lost its checkpoints resumes from the copy, including the steps that a rollback
excluded.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_pipeline.common.own_files import remove_own_files
from data_pipeline.errors import CheckpointCorruptError, StorageError
from megaback.checkpoints.checkpoint import CheckpointMeta, verify_files, verify_together
from megaback.checkpoints.copies import CheckpointCopies
from megaback.checkpoints.remote_copy import CopyTarget
from megaback.checkpoints.safetensors_file import size_and_hash
from megaback.copy_location import BaseCopy
from megaback.distributed.world import World
from megaback.faults.start_fence import NO_FENCE, Fence
from megaback.faults.step_guard import merge_skipped_steps
from megaback.run_folder import CHECKPOINT_FILE, CHECKPOINTS_FOLDER, FETCHED_NAME, META_NAME


def fetch_newest(
    run: Path, place: CopyTarget, world: World, fence: Fence = NO_FENCE
) -> tuple[Path, CheckpointMeta] | None:
    """Fetch the newest copy that verifies into a run's folder; None if there is no copy.

    Collective: every rank fetches and hashes part of the files. Raises CheckpointCorruptError on
    all ranks if there are copies and none of them verifies.
    """
    problems: list[str] = []
    names = world.run_collectively(lambda: place.complete() if world.is_first else [])
    for name in reversed(world.of_first(names, list[str])):
        fetch = _Fetch(run, place, name, world, fence)
        meta, reported = _fetch(fetch)
        if meta is not None and not reported:
            return fetch.target, meta
        problems.extend(reported)
    if problems:
        raise CheckpointCorruptError(f"no copy in {place.name} verifies: {problems[0]}")
    return None


def fetch_base(
    folder: Path, copy: BaseCopy, world: World, fence: Fence = NO_FENCE
) -> tuple[Path, CheckpointMeta]:
    """Fetch one copy into a folder, as a run's; one that is there and verifies is used as it is.

    Collective. Raises CheckpointCorruptError on all ranks if it does not verify.
    """
    target = folder / CHECKPOINTS_FOLDER / copy.folder
    meta, problems = verify_together(target, world)
    is_same = (
        world.is_first and not problems and size_and_hash(target / META_NAME)[1] == (copy.sha256)
    )
    if meta is not None and world.of_first(is_same, bool):
        return target, meta
    place = world.run_collectively(CheckpointCopies, copy.location)
    meta, problems = _fetch(_Fetch(folder, place, copy.folder, world, fence), copy.sha256)
    if meta is None or problems:
        raise CheckpointCorruptError(
            f"{copy.name} does not verify: {problems[0]}; give another checkpoint"
        )
    return target, meta


def _fetch(fetch: "_Fetch", sha256: str | None = None) -> tuple[CheckpointMeta | None, list[str]]:
    """Metadata of a fetched copy, and what is wrong with it on any rank. Collective."""
    world = fetch.world
    meta, problem = world.run_collectively(fetch.begin, sha256)
    meta = world.of_first(meta, CheckpointMeta | None)
    if meta is not None:
        problem = world.run_collectively(fetch.get_part, meta)
    reported = [text for text in world.gather(problem, str | None) if text]
    world.run_collectively(fetch.finish, not reported)
    return meta, reported


class _Fetch:
    """A copy that all ranks fetch into the checkpoints of a run."""

    def __init__(
        self, run: Path, place: CheckpointCopies, name: str, world: World, fence: Fence
    ) -> None:
        self.target = run / CHECKPOINTS_FOLDER / name
        self._partial = self.target.with_name(FETCHED_NAME)
        self._run, self._place, self._name = run, place, name
        self.world, self._fence = world, fence

    def begin(self, sha256: str | None = None) -> tuple[CheckpointMeta | None, str | None]:
        """Fetch the metadata, on the first rank, into an empty folder; or what is wrong with it.

        `sha256`: expected hash of the metadata.
        """
        if not self.world.is_first:
            return None, None
        shutil.rmtree(self._partial, ignore_errors=True)  # left by a killed start
        with self._storage_errors():
            self._partial.mkdir(parents=True)
            try:
                meta = self._place.get_meta(self._name, self._partial)
                if sha256 not in (None, size_and_hash(self._partial / META_NAME)[1]):
                    return None, f"{META_NAME} has been replaced"
                return meta, None
            except CheckpointCorruptError as error:
                return None, str(error)

    def get_part(self, meta: CheckpointMeta) -> str | None:
        """Fetch and verify this rank's part of the files; returns what is wrong with it."""
        rank, size = self.world.rank, self.world.size
        with self._storage_errors():
            try:
                self._place.get(self._name, self._partial, meta, rank, size)
                verify_files(self._partial, meta, rank, size)
            except CheckpointCorruptError as error:
                return str(error)
        return None

    def finish(self, is_whole: bool) -> None:
        """Make the fetched files a checkpoint of the run, or remove them, on the first rank."""
        if not self.world.is_first:
            return
        try:
            with self._storage_errors():
                if is_whole:
                    self._fence.check()
                    if (skipped := self._place.skipped_steps()) is not None:
                        merge_skipped_steps(self._run, skipped, self._place.name)
                    remove_own_files(self.target, CHECKPOINT_FILE)
                    os.replace(self._partial, self.target)
        finally:
            shutil.rmtree(self._partial, ignore_errors=True)

    @contextmanager
    def _storage_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageError(
                f"cannot fetch {self._name} from {self._place.name}: {error}"
            ) from None
