"""Location of copies of checkpoints, a path or URL: which are complete, and their metadata.

A location has a folder per checkpoint, which is complete once it has a `meta.json`. Loads no torch,
so that the launcher can check a base (`branch_from`, `init_from`) in such a location.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError
from data_pipeline.redaction import is_url, shown_url
from data_pipeline.storage.drivers import guarded, open_file_system
from megaback.run_folder import (
    MAX_META_BYTES,
    MAX_SKIPPED_STEPS_BYTES,
    META_NAME,
    SKIPPED_STEPS_NAME,
    STEP_FOLDER,
)


class CopyLocation:
    """Location of the copies of a run's checkpoints."""

    def __init__(self, address: str) -> None:
        """Raises the errors of URLs, and BackendError for a file system that is not installed."""
        url = address if is_url(address) else f"file://{Path(address).absolute()}"
        self.name = shown_url(url)
        self._files, self._root = open_file_system(url)

    def path(self, *names: str) -> str:
        """Path within the location."""
        return "/".join([self._root.rstrip("/"), *names])

    def complete(self) -> list[str]:
        """The names of complete checkpoints, oldest first. Raises OSError."""
        return sorted(
            name
            for name in self._names()
            if STEP_FOLDER.fullmatch(name) and self._files.exists(self.path(name, META_NAME))
        )

    def meta_text(self, folder: str) -> bytes:
        """Content of a copy's meta.json. Raises CheckpointCorruptError, OSError."""
        self._files.invalidate_cache()
        return self._read(MAX_META_BYTES, folder, META_NAME)

    def skipped_steps(self) -> bytes | None:
        """The steps that a rollback excluded, as in the run's file. Raises OSError."""
        if not self._files.exists(self.path(SKIPPED_STEPS_NAME)):
            return None
        return self._read(MAX_SKIPPED_STEPS_BYTES, SKIPPED_STEPS_NAME)

    def _read(self, max_bytes: int, *names: str) -> bytes:
        """Read a small file. Raises OSError, CheckpointCorruptError."""
        data = bytes(self._files.cat_file(self.path(*names), start=0, end=max_bytes + 1))
        if len(data) > max_bytes:
            raise CheckpointCorruptError(
                f"{names[-1]} in {self.name} has more than {max_bytes:,} bytes"
            )
        return data

    def _names(self) -> list[str]:
        self._files.invalidate_cache()
        if not self._files.exists(self._root):
            return []
        return [Path(path).name for path in self._files.ls(self._root, detail=False)]


@dataclass(frozen=True, kw_only=True)
class BaseCopy:
    """Complete copy of a checkpoint from which a run begins."""

    location: str
    """Address of the location, which may refer to variables with its secrets."""
    folder: str
    sha256: str
    """Hash of its meta.json."""

    @property
    def name(self) -> str:
        """Its address, without secrets."""
        return f"{shown_url(self.location)}/{self.folder}"


def location_of(base: str) -> tuple[str, str | None]:
    """Address of the location that a base's address names, and of one of its checkpoints if any."""
    location, _, folder = base.rstrip("/").rpartition("/")
    if STEP_FOLDER.fullmatch(folder):
        return location, folder
    return base.rstrip("/"), None


def find_base_copy(base: str) -> tuple[BaseCopy, bytes] | None:
    """The copy that an address names, or the newest complete one of its location, if there is one.

    With the content of its meta.json. Raises CheckpointCorruptError, SourceUnreadableError, and the
    errors of `open_file_system`.
    """
    location, folder = location_of(base)
    copies = CopyLocation(location)

    def find() -> tuple[BaseCopy, bytes] | None:
        names = copies.complete() if folder is None else [folder]
        if not names:
            return None
        try:
            text = copies.meta_text(names[-1])
        except FileNotFoundError:
            return None
        sha256 = hashlib.sha256(text).hexdigest()
        return BaseCopy(location=location, folder=names[-1], sha256=sha256), text

    return guarded(base, find)


def require_base_copy(init_from: str) -> BaseCopy:
    """The copy that `init_from` names. Raises CheckpointMissingError, and as `find_base_copy`."""
    found = find_base_copy(init_from)
    if found is None:
        raise CheckpointMissingError(
            f"init_from {shown_url(init_from)} has no complete copy of a checkpoint; give the "
            "checkpoint.copy_to of a run with the run's name, or a local path"
        )
    return found[0]
