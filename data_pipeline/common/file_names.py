"""Validation of file names read from untrusted manifests, indexes and records.

Such a name is a plain name in the folder of the file that contains it. It leads to no other folder,
neither by its components nor through a symbolic link. The folder itself, which the user named, may
be a link.
"""

import os
import re
from pathlib import Path

_MAX_NAME_BYTES = 255
"""Maximum length of a name in Linux's file systems."""
_RESERVED = frozenset("/\\:\0")
"""Characters that separate folders, drives or streams on some system."""


def plain_name(name: object, form: re.Pattern[str] | None = None) -> str:
    """The name, unchanged, if it is a plain file name that matches `form`. Raises ValueError."""
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or not _RESERVED.isdisjoint(name)
        or not name.isprintable()
        or len(os.fsencode(name)) > _MAX_NAME_BYTES
        or (form is not None and form.fullmatch(name) is None)
    ):
        raise ValueError(f"{name!r:.80} is not a plain file name")
    return name


def path_within(folder: Path, name: object, form: re.Pattern[str] | None = None) -> Path:
    """Path of a file named in another file of the folder; it need not exist.

    Of links out of the folder, only those of Hugging Face cache snapshots to files of the same
    repository are allowed. Raises ValueError.
    """
    path = folder / plain_name(name, form)
    if path.is_symlink() and leads_out(path, folder):
        raise ValueError(
            f"{name!r:.80} is a symbolic link out of its folder; replace it with a copy of the file"
        )
    return path


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path, with links resolved, is outside a folder and the cache that contains it."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return not any(target.is_relative_to(root) for root in _roots(home))


def _roots(folder: Path) -> list[Path]:
    """The folder and, for a snapshot of the Hugging Face cache, the blobs that its links target.

    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    is_snapshot = folder.parent.name == "snapshots" and folder.parents[1].name.startswith(
        ("models--", "datasets--")
    )
    return [folder, folder.parents[1] / "blobs"] if is_snapshot else [folder]
