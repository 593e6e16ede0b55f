"""The folder of a cache: marked as ours, and whatever else lies in it stays untouched.

Layout:
  CACHEDIR.TAG   the marker, by which backups leave the folder out (https://bford.info/cachedir/)
  .lock, .bytes  bookkeeping: whoever adds frames, and their size together
  KEY/FRAME      the frames of one shard; KEY is a SHA-256, FRAME a number

Only regular files by such names, in real folders by such names, are counted, read or removed. The
folder itself may be a link: the user named it. Everything in it is opened by a descriptor of the
folder above, never through a link.
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
"""Folders of earlier versions: nothing in them is read any more, and it is removed first."""
_NUMBER = r"(?:0|[1-9][0-9]{0,18})"
_PARTIAL = r"\.[0-9a-f]{12}\.partial"
_FRAME = re.compile(rf"{_NUMBER}|\.{_NUMBER}{_PARTIAL}")
"""A frame, or one in the making."""
_MARKER_IN_THE_MAKING = re.compile(rf"\.{re.escape(MARKER_NAME)}{_PARTIAL}")
_NO_CONTENT = re.compile(r"lost\+found|\.DS_Store|\.nfs[0-9a-f]+")
_UNMAPPED_USER = 65534
"""Owner of a file where the system cannot tell."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY
# Not blocking: a pipe in the place of a file would keep whoever opens it waiting.
_READ = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK
_WRITE = os.O_WRONLY | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK
_MAX_SMALL_BYTES = 4096

Entry: TypeAlias = "os.DirEntry[str]"


class OpenFolder:
    """A descriptor of a folder, closed with the last reference: other threads may be using it."""

    def __init__(self, path: Path | str, inside: "OpenFolder | None" = None) -> None:
        """Inside another one, a link is not followed. Raises OSError."""
        self.number = -1  # what __del__ finds if opening fails
        if inside is None:
            self.number = os.open(path, _FOLDER)
        else:
            self.number = os.open(path, _FOLDER | os.O_NOFOLLOW, dir_fd=inside.number)

    def __del__(self) -> None:
        if self.number >= 0:
            os.close(self.number)


class StoredFrame(NamedTuple):
    """A file of a frame; the one that was not used for longest comes first."""

    used_ns: int
    num_bytes: int
    key: str
    name: str


def require_cache_folder(path: Path) -> None:
    """See that a folder is ours, or may be made or taken. Writes nothing.

    Raises OutputExistsError for one that holds something else, ConfigError for one in which others
    could replace frames. A disk that fails is no reason: the cache is then left alone.
    """
    try:
        folder = OpenFolder(path)
        require_safe(folder, path)
        # Another process may mark it between these looks.
        is_ours = is_marked(folder) or _may_be_taken(folder) or is_marked(folder)
    except NotADirectoryError:
        is_ours = not path.exists()
    except OSError:
        return
    if not is_ours:
        raise OutputExistsError(
            f"the cache {path} is not empty and is no cache of this version of megaback (it has no "
            f"{MARKER_NAME} of ours); nothing in it was touched: choose another data.cache"
        )


def require_safe(folder: OpenFolder, path: Path) -> None:
    """Raises ConfigError for a folder in which other users could put frames of theirs."""
    facts = os.fstat(folder.number)
    if facts.st_mode & stat.S_IWOTH:
        raise ConfigError(
            f"the cache {path} can be written by every user of this machine, who could replace "
            "what is trained on; run `chmod o-w` on it, or choose another data.cache"
        )
    me = os.geteuid()
    if me != 0 and facts.st_uid not in (me, 0, _UNMAPPED_USER):
        raise ConfigError(
            f"the cache {path} belongs to another user (number {facts.st_uid}), who could replace "
            "what is trained on; choose a data.cache of your own"
        )


def is_marked(folder: OpenFolder) -> bool:
    """Whether a folder has our marker. Raises OSError."""
    return read_small(folder, MARKER_NAME) == MARKER


def mark(folder: OpenFolder) -> None:
    """Make a folder ours that is empty, or was of an earlier version. Raises FileExistsError."""
    if is_marked(folder):
        return
    if not _may_be_taken(folder) and not is_marked(folder):  # others may have marked it just now
        raise FileExistsError(errno.EEXIST, "it holds something else")
    write_whole(folder, MARKER_NAME, MARKER)


def read_small(folder: OpenFolder, name: str) -> bytes | None:
    """The first bytes of a file; None where there is none. Raises OSError."""
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
    """Write a file that appears under its name whole, or not at all. Raises OSError.

    Not flushed to the disk: what a crash damages is fetched again.
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
    """A file that is so large, noted as used now; None for any other, of which nothing is read."""
    try:
        file = os.open(name, _READ, dir_fd=folder.number)
    except OSError:
        return None
    try:
        facts = os.fstat(file)
        if facts.st_size != num_bytes or not stat.S_ISREG(facts.st_mode):
            return None
        data = os.pread(file, num_bytes, 0)
        # The latest use, whatever the disk notes of reads; it may be one that is read only.
        with suppress(OSError):
            os.utime(file)
    except OSError:
        return None
    finally:
        os.close(file)
    return data


def stored_frames(folder: OpenFolder) -> list[StoredFrame]:
    """Every frame, whole or in the making, by the time of its last use. Raises OSError."""
    found = []
    for key in _names(folder, _is_shard):
        is_old = _KEY_OF_FORMAT_1.fullmatch(key) is not None
        with suppress(OSError), _entries(OpenFolder(key, folder)) as files:  # perhaps gone by now
            for file in files:
                if _is_frame(file):
                    with suppress(FileNotFoundError):  # renamed just now, or removed
                        facts = file.stat(follow_symlinks=False)
                        used_ns = 0 if is_old else facts.st_mtime_ns
                        found.append(StoredFrame(used_ns, facts.st_size, key, file.name))
    return sorted(found)


def remove_frames(folder: OpenFolder, frames: Iterable[StoredFrame]) -> None:
    """Remove frames, and the folders that are empty then. Raises OSError."""
    by_key = sorted(frames, key=lambda frame: frame.key)
    for key, some in groupby(by_key, key=lambda frame: frame.key):
        with suppress(FileNotFoundError):
            shard = OpenFolder(key, folder)
            for frame in some:
                with suppress(FileNotFoundError):
                    os.unlink(frame.name, dir_fd=shard.number)
        with suppress(OSError):  # there are others in it
            os.rmdir(key, dir_fd=folder.number)


def _may_be_taken(folder: OpenFolder) -> bool:
    """Whether a folder without a marker holds nothing but what a cache holds, if anything."""
    return not _names(folder, lambda entry: not _is_of_a_cache(entry, folder))


def _is_of_a_cache(entry: Entry, folder: OpenFolder) -> bool:
    if _is_shard(entry):
        return not _names(OpenFolder(entry.name, folder), lambda file: not _is_frame(file))
    if entry.name in (LOCK_NAME, SIZE_NAME) or _MARKER_IN_THE_MAKING.fullmatch(entry.name):
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
    # By a descriptor of its own: those that were inherited share the place up to which was read.
    own = OpenFolder(".", folder)
    with os.scandir(own.number) as entries:
        yield entries
