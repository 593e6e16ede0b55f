"""Removing what megaback wrote, by the names that it gave, and nothing that lies beside it.

Whatever else is in such a folder is somebody's: a note, or the output of another command.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from data_pipeline.common.atomic import whole_name


def unfinished_in(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """What was left of files with such names when their writer was killed.

    Others may be writing in the same folder: their files are not among them.
    """
    return [folder / name for name in _own_names(folder, names) if not names.fullmatch(name)]


def remove_own_files(folder: Path, names: re.Pattern[str]) -> None:
    """Remove the files with such names, whole or not, and the folder if nothing else is in it.

    A link goes, and what it leads to stays; where the folder itself is a link, nothing is done. A
    file that cannot be removed stays.
    """
    for name in _own_names(folder, names):
        with suppress(OSError):
            (folder / name).unlink()
    if not folder.is_symlink():
        with suppress(OSError):  # it is not empty, or not there
            folder.rmdir()


def holds_only(folder: Path, names: re.Pattern[str]) -> bool:
    """Whether a folder, which is no link, holds only files with such names. Raises OSError."""
    return not folder.is_symlink() and len(list(folder.iterdir())) == len(_own_names(folder, names))


def _own_names(folder: Path, names: re.Pattern[str]) -> list[str]:
    if folder.is_symlink() or not folder.is_dir():
        return []
    with os.scandir(folder) as entries:
        return [
            entry.name
            for entry in entries
            if _is_own(entry.name, names) and not entry.is_dir(follow_symlinks=False)
        ]


def _is_own(name: str, names: re.Pattern[str]) -> bool:
    return names.fullmatch(whole_name(name) or name) is not None
