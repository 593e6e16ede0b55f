"""Cache folder: marked as ours; other files in it are never touched.

Layout:
  CACHEDIR.TAG   the marker, by which backups skip the folder (https://bford.info/cachedir/)
  .lock, .bytes  lock of writers, and total size of the frames
  KEY/FRAME      the frames of one shard; KEY is a SHA-256, FRAME a number

Only regular files with such names, in real folders with such names, are counted, read or removed.
The folder itself may be a link: the user named it. Everything in it is opened relative to the
descriptor of its parent folder, never through a link.
"""

import errno
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple, TypeAlias

from data_pipeline.common.atomic import partial_name
from data_pipeline.errors import ConfigError, OutputExistsError

MARKER_NAME = "CACHEDIR.TAG"
MARKER = (
    b"Signature: 8a477f597d28d172789f06886806bc55\n"
    b"# Cache of megaback, format 2: frames of data sets behind a URL. May be deleted.\n"
    b"# Cache directory tags: https://bford.info/cachedir/\n"
)
LOCK_NAME = ".lock"
SIZE_NAME = ".bytes"

_KEY = re.compile(r"[0-9a-f]{64}")
_KEY_OF_FORMAT_1 = re.compile(r"[0-9a-f]{16}")
"""Names of folders of an earlier version, which are never read and are removed first."""
_NUMBER = r"(?:0|[1-9][0-9]{0,18})"
_PARTIAL = r"\.[0-9a-f]{12}\.partial"
_FRAME = re.compile(rf"{_NUMBER}|\.{_NUMBER}{_PARTIAL}")
"""Name of a frame, or of one that is being written."""
_PARTIAL_MARKER = re.compile(rf"\.{re.escape(MARKER_NAME)}{_PARTIAL}")
_NO_CONTENT = re.compile(r"lost\+found|\.DS_Store|\.nfs[0-9a-f]+")
_UNMAPPED_USER = 65534
"""Owner of files whose user id has no mapping, as in a user namespace."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
# Not blocking: opening a pipe in place of a file would wait.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
_MAX_SMALL_BYTES = 4096

Entry: TypeAlias = "os.DirEntry[str]"


class OpenFolder:
    """Descriptor of a folder, closed with the last reference, as other threads may use it."""

    def __init__(self, path: Path | str, inside: "OpenFolder | None" = None) -> None:
        """A link inside another folder is not followed. Raises OSError."""
        self.number = -1  # for __del__ if opening fails
        if inside is None:
            self.number = os.open(path, _FOLDER)
        else:
            self.number = os.open(path, _FOLDER | os.O_NOFOLLOW, dir_fd=inside.number)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class StoredFrame(NamedTuple):
    """File of a frame; sorts by last use, oldest first."""

    used_ns: int
    num_bytes: int
    key: str
    name: str


def require_cache_folder(path: Path) -> None:
    """Check that a folder is our cache, or can become it. Writes nothing.

    Raises OutputExistsError for one that holds other files, ConfigError for one in which other
    users could replace frames. A failing disk is no error: the cache is then not used.
    """
    try:
        folder = OpenFolder(path)
        require_safe(folder, path)
        # Another process may mark it between these checks.
        is_ours = is_marked(folder) or _may_be_taken(folder) or is_marked(folder)
    except NotADirectoryError:
        is_ours = not path.exists()
    except OSError:
        return
    if not is_ours:
        raise OutputExistsError(
            f"the cache folder {path} holds other files (it has no {MARKER_NAME} of this version "
            "of megaback) and was not changed; choose another data.cache"
        )


def require_safe(folder: OpenFolder, path: Path) -> None:
    """Raises ConfigError for a folder in which other users could write frames."""
    facts = os.fstat(folder.number)
    if facts.st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"the cache folder {path} is writable by every user of this machine, who could replace "
            "training data; run `chmod o-w` on it, or choose another data.cache"
        )
    me = os.geteuid()
    if me != 0 and facts.st_uid not in (me, 0, _UNMAPPED_USER):
        raise ConfigError(
            f"the cache folder {path} belongs to another user (uid {facts.st_uid}), who could "
            "replace training data; choose a data.cache of your own"
        )


def is_marked(folder: OpenFolder) -> bool:
    """Whether a folder has our marker. Raises OSError."""
    return read_small(folder, MARKER_NAME) == MARKER


def mark(folder: OpenFolder) -> None:
    """Mark a folder that is empty, or of an earlier version, as ours. Raises FileExistsError."""
    if is_marked(folder):
        return
    if not _may_be_taken(folder) and not is_marked(
        folder
    ):  # another process may just have marked it
        raise FileExistsError(errno.EEXIST, "it holds something else")
    write_whole(folder, MARKER_NAME, MARKER)


def read_small(folder: OpenFolder, name: str) -> bytes | None:
    """The first bytes of a file; None if there is no file. Raises OSError."""
    try:
        file = os.open(name, _READ, dir_fd=folder.number)
    except FileNotFoundError:
        return None
    try:
        return os.pread(file, _MAX_SMALL_BYTES, 0) if stat.S_ISREG(os.fstat(file).st_mode) else None
    finally:
        os.close(file)


def write_small(folder: OpenFolder, name: str, data: bytes) -> None:
    """Replace a file's content in place. Raises OSError."""
    file = os.open(name, _WRITE | os.O_TRUNC, 0o666, dir_fd=folder.number)
    try:
        os.write(file, data)
    finally:
        os.close(file)


def write_whole(folder: OpenFolder, name: str, data: bytes) -> None:
    """Write a file atomically. Raises OSError.

    Not flushed to disk: a frame that a crash damages is fetched again.
    """
    partial = partial_name(name)
    file = os.open(partial, _WRITE | os.O_EXCL, 0o666, dir_fd=folder.number)
    try:
        try:
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(file, rest) :]
        finally:
            os.close(file)
        os.rename(partial, name, src_dir_fd=folder.number, dst_dir_fd=folder.number)
    except BaseException:
        with suppress(OSError):
            os.unlink(partial, dir_fd=folder.number)
        raise


def read_frame(folder: OpenFolder, name: str, num_bytes: int) -> bytes | None:
    """A file of this size, marked as used now; None for any other, which is not read."""
    try:
        file = os.open(name, _READ, dir_fd=folder.number)
    except OSError:
        return None
    try:
        facts = os.fstat(file)
        if facts.st_size != num_bytes or not stat.S_ISREG(facts.st_mode):
            return None
        data = os.pread(file, num_bytes, 0)
        # Set explicitly, as file systems may not record reads. May fail on a read-only one.
        with suppress(OSError):
            os.utime(file)
    except OSError:
        return None
    finally:
        os.close(file)
    return data


def stored_frames(folder: OpenFolder) -> list[StoredFrame]:
    """Every frame, complete or being written, by time of last use. Raises OSError."""
    found = []
    for key in _names(folder, _is_shard):
        is_old = _KEY_OF_FORMAT_1.fullmatch(key) is not None
        with suppress(OSError), _entries(OpenFolder(key, folder)) as files:  # perhaps removed since
            for file in files:
                if _is_frame(file):
                    with suppress(FileNotFoundError):  # renamed or removed since
                        facts = file.stat(follow_symlinks=False)
                        used_ns = 0 if is_old else facts.st_mtime_ns
                        found.append(StoredFrame(used_ns, facts.st_size, key, file.name))
    return sorted(found)


def remove_frames(folder: OpenFolder, frames: Iterable[StoredFrame]) -> None:
    """Remove frames, and folders that become empty. Raises OSError."""
    by_key = sorted(frames, key=lambda frame: frame.key)
    for key, some in groupby(by_key, key=lambda frame: frame.key):
        with suppress(FileNotFoundError):
            shard = OpenFolder(key, folder)
            for frame in some:
                with suppress(FileNotFoundError):
                    os.unlink(frame.name, dir_fd=shard.number)
        with suppress(OSError):  # not empty
            os.rmdir(key, dir_fd=folder.number)


def _may_be_taken(folder: OpenFolder) -> bool:
    """Whether a folder without a marker is empty or holds only files of a cache."""
    return not _names(folder, lambda entry: not _is_of_a_cache(entry, folder))


def _is_of_a_cache(entry: Entry, folder: OpenFolder) -> bool:
    if _is_shard(entry):
        return not _names(OpenFolder(entry.name, folder), lambda file: not _is_frame(file))
    if entry.name in (LOCK_NAME, SIZE_NAME) or _PARTIAL_MARKER.fullmatch(entry.name):
        return entry.is_file(follow_symlinks=False)
    return _NO_CONTENT.fullmatch(entry.name) is not None


def _is_shard(entry: Entry) -> bool:
    name = entry.name
    is_key = _KEY.fullmatch(name) is not None or _KEY_OF_FORMAT_1.fullmatch(name) is not None
    return is_key and entry.is_dir(follow_symlinks=False)


def _is_frame(entry: Entry) -> bool:
    return _FRAME.fullmatch(entry.name) is not None and entry.is_file(follow_symlinks=False)


def _names(folder: OpenFolder, is_wanted: Callable[[Entry], bool]) -> list[str]:
    with _entries(folder) as entries:
        return [entry.name for entry in entries if is_wanted(entry)]


@contextmanager
def _entries(folder: OpenFolder) -> Iterator[Iterator[Entry]]:
    # With its own descriptor: inherited ones share the read position.
    own = OpenFolder(".", folder)
    with os.scandir(own.number) as entries:
        yield entries
