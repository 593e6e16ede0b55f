"""Removal of megaback's own files, recognized by name.

Other files in the folder, such as notes or the output of another command, are kept.
"""

import os
import re
from contextlib import suppress
from pathlib import Path

from data_pipeline.common.atomic import whole_name


def unfinished_in(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """Partial files with such final names, left by writers that were killed.

    Partial files of other writers in the same folder are not included.
    """
    return [folder / name for name in _own_names(folder, names) if not names.fullmatch(name)]


def remove_own_files(folder: Path, names: re.Pattern[str]) -> None:
    """Remove files with such names, complete or partial, and the folder if it is empty then.

    Links are removed, not their targets; a folder that is a link is left alone. Files that cannot
    be removed are skipped.
    """
    for name in _own_names(folder, names):
        with suppress(OSError):
            (folder / name).unlink()
    if not folder.is_symlink():
        with suppress(OSError):  # not empty, or missing
            folder.rmdir()


def holds_only(folder: Path, names: re.Pattern[str]) -> bool:
    """Whether a folder is not a link and contains only files with such names. Raises OSError."""
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
