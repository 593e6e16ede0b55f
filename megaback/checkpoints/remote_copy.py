"""Copies of complete checkpoints in a second location (`checkpoint.copy_to`), a path or URL.

Each rank copies the files that it wrote and reads them back to compare hashes; the first rank also
copies the tokenizer and, last, `meta.json`. A failed copy is reported, and the next checkpoint is
copied again: it does not end the run. `fetching` fetches them back.
"""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from threading import Thread

from data_pipeline.common.command import storage_error
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import (
    CheckpointCorruptError,
    MegabackError,
    OutputExistsError,
    StorageError,
)
from data_pipeline.redaction import scrub
from megaback.checkpoints.checkpoint import CheckpointMeta, read_meta
from megaback.checkpoints.copies import CheckpointCopies
from megaback.checkpoints.safetensors_file import SizeAndHash
from megaback.config_operation import CheckpointSection
from megaback.distributed.world import World
from megaback.faults.start_fence import NO_FENCE, Fence
from megaback.run_folder import (
    CHECKPOINT_FILE,
    MAX_META_BYTES,
    META_NAME,
    ROLLED_BACK_PREFIX,
    SKIPPED_STEPS_NAME,
    STEP_FOLDER,
    TENSORS_SUFFIX,
)

_READ_BYTES = 1 << 23


class CopyTarget(CheckpointCopies):
    """Location of a run's copies, which it writes: the folder with its name in `copy_to`."""

    def __init__(self, url: str, run: Path) -> None:
        """Raises the errors of `CheckpointCopies`."""
        super().__init__(f"{url.rstrip('/')}/{run.resolve().name}")

    def require_ours(self) -> None:
        """Raises OutputExistsError if the location has anything but copies, and OSError."""
        seen = [name for name in self._names() if not name.startswith(".")]
        ours = (ROLLED_BACK_PREFIX, SKIPPED_STEPS_NAME)
        others = [
            name for name in seen if not (STEP_FOLDER.fullmatch(name) or name.startswith(ours))
        ]
        if others:
            raise OutputExistsError(
                f"checkpoint.copy_to would write to {self.name}, which contains {others[0]}, not "
                "only copies of checkpoints; choose another location, or another run folder"
            )

    def make_incomplete(self, folder: str) -> None:
        """Remove the meta.json of a copy before it is written again."""
        if self._files.exists(self.path(folder, META_NAME)):
            self._files.rm_file(self.path(folder, META_NAME))

    def put(self, source: Path, folder: str, expected: SizeAndHash) -> None:
        """Copy a file and read it back. Raises OSError, CheckpointCorruptError."""
        self._files.makedirs(self.path(folder), exist_ok=True)
        target = self.path(folder, source.name)
        self._files.put_file(str(source), target)
        digest, num_bytes = hashlib.sha256(), 0
        with self._files.open(target, "rb") as file:
            while block := file.read(_READ_BYTES):
                digest.update(block)
                num_bytes += len(block)
        if (num_bytes, digest.hexdigest()) != tuple(expected):
            raise CheckpointCorruptError(f"{source.name} in {self.name} differs from its original")

    def complete_with(self, meta: bytes, folder: str) -> None:
        """Write the meta.json of a copy whose files are all written."""
        self._files.pipe_file(self.path(folder, META_NAME), meta)

    def roll_back(self, step: int, skipped_steps: bytes, aside: str) -> None:
        """Move the copies after `step` into the folder `aside`, and store the steps to skip.

        Otherwise a run that is fetched would resume from weights of before the rollback. Does
        nothing if there are no copies. Raises StorageError.
        """
        try:
            names = self._names()
            if not names:
                return
            self._files.pipe_file(self.path(SKIPPED_STEPS_NAME), skipped_steps)
            while aside in names:
                aside += "-again"
            for name in names:
                if STEP_FOLDER.fullmatch(name) and int(name.partition("-")[2]) > step:
                    self._files.makedirs(self.path(aside), exist_ok=True)
                    self._files.mv(self.path(name), self.path(aside, name), recursive=True)
        except Exception as error:  # noqa: BLE001 (file systems raise errors of any type)
            raise StorageError(
                f"the copies in {self.name} cannot be rolled back ({_reason(error)}), so the run "
                "was not changed; run the same command when that location is writable, or remove "
                "checkpoint.copy_to from the run's config"
            ) from None

    def rotate(self, section: CheckpointSection, fence: Fence = NO_FENCE) -> None:
        """Delete old and incomplete copies."""
        complete = self.complete()
        newest = complete[-section.keep_last :]
        finite = next((name for name in reversed(complete) if self._is_finite(name)), None)
        if finite is not None:
            newest.append(finite)
        for name in self._names():
            if not STEP_FOLDER.fullmatch(name) or name in newest or self._is_link(name):
                continue
            fence.check()
            step, every = int(name.partition("-")[2]), section.keep_every_steps
            if name in complete:
                if every is not None and step % every == 0:
                    continue
                self._files.rm_file(self.path(name, META_NAME))
            self._remove(name)

    def _remove(self, name: str) -> None:
        """Remove the files of a copy, and its folder if it is then empty."""
        paths = self._files.ls(self.path(name), detail=False)
        for path in paths:
            if CHECKPOINT_FILE.fullmatch(Path(path).name):
                self._files.rm_file(path)
        with suppress(OSError, NotImplementedError):  # object stores have no folders
            self._files.rmdir(self.path(name))

    def _is_link(self, name: str) -> bool:
        """Whether a copy's folder is a symbolic link, on file systems that have them."""
        info = self._files.info(self.path(name))
        return bool(info.get("islink")) or info.get("type") == "link"

    def _is_finite(self, name: str) -> bool:
        try:
            return self.meta(name).is_finite
        except CheckpointCorruptError:
            return False


class CheckpointCopier:
    """Copier of a run's checkpoints, one at a time; those saved during a copy are skipped."""

    def __init__(
        self, run: Path, section: CheckpointSection, world: World, fence: Fence = NO_FENCE
    ) -> None:
        self._section, self._world, self._fence = section, world, fence
        self._copying: _Copying | None = None
        self._place = CopyTarget(section.copy_to, run) if section.copy_to is not None else None

    @property
    def is_open(self) -> bool:
        """Whether a copy was begun and is not complete: the same on every rank."""
        return self._copying is not None

    @property
    def is_copying(self) -> bool:
        """Whether this rank is still copying."""
        return self._copying is not None and self._copying.is_alive()

    def begin(self, target: Path | None) -> None:
        """Start to copy a complete checkpoint, unless a copy is in progress. Collective."""
        if self._place is None or target is None or self._copying is not None:
            return
        self._fence.check()
        if self._world.is_first:
            # An error here recurs for the files, and is reported then.
            with suppress(Exception):
                self._place.make_incomplete(target.name)
        self._world.barrier()
        self._copying = _Copying(self._place, target, self._world.rank, self._fence)
        self._copying.start()

    def finish(self, log: Callable[[str], None]) -> None:
        """Wait for the parts of all ranks, and complete the copy. Collective."""
        copying, world = self._copying, self._world
        if copying is None or self._place is None:
            return
        copying.join()
        self._copying = None
        problems = [text for text in world.gather(copying.problem, str | None) if text]
        if not problems and world.is_first:
            try:
                self._fence.check()
                self._place.complete_with(copying.meta, copying.target.name)
                self._place.rotate(self._section, self._fence)
            except Exception as error:  # noqa: BLE001 (file systems raise errors of any type)
                problems.append(_reason(error))
        if problems and world.is_first:
            log(
                f"megaback: {copying.target.name} was not copied to {self._place.name}: "
                f"{problems[0]}; training continues, and the next checkpoint is copied again"
            )


class _Copying(Thread):
    """A rank's part of a copy."""

    def __init__(self, place: CopyTarget, target: Path, rank: int, fence: Fence) -> None:
        super().__init__(name="checkpoint-copy", daemon=True)
        self.target = target
        self.problem: str | None = None
        self.meta = b""
        self._place, self._rank, self._fence = place, rank, fence

    def run(self) -> None:
        try:
            self.meta = read_file(self.target / META_NAME, MAX_META_BYTES)
            meta = read_meta(self.target)
            for name, expected in meta.files.items():
                if _writer_of(name) % meta.world_size == self._rank:
                    self._fence.check()
                    self._place.put(self.target / name, self.target.name, expected)
        except Exception as error:  # noqa: BLE001 (file systems raise errors of any type)
            self.problem = _reason(error)


def newest_meta(place: CopyTarget) -> CheckpointMeta | None:
    """Metadata of the newest readable copy, or None. Raises StorageError."""
    for name in reversed(place.complete()):
        with suppress(CheckpointCorruptError, FileNotFoundError):
            return place.meta(name)
    return None


def _writer_of(name: str) -> int:
    """The rank in a file's name; 0 for the files of no rank."""
    digits = name.removesuffix(TENSORS_SUFFIX).rpartition("-")[2]
    return int(digits) if digits.isdigit() else 0


def _reason(error: Exception) -> str:
    if isinstance(error, MegabackError):
        return str(error)
    if isinstance(error, OSError) and error.errno:
        return str(storage_error(error))
    return scrub(f"{type(error).__name__}: {' '.join(str(error).split())}")
