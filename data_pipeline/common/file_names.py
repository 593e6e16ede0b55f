"""Names of files that come from files: a manifest, an index or a record may be a stranger's.

Such a name is a plain name in the folder of the file that gives it. It reaches no other folder,
neither by its own parts nor through a symbolic link. The folder itself was named by the user, who
may have linked it.
"""

import os
import re
from pathlib import Path

_MAX_NAME_BYTES = 255
"""The longest name that Linux's file systems take."""
_RESERVED = frozenset("/\\:\0")
"""Characters that separate folders, drives or streams on some system."""


def plain_name(name: object, form: re.Pattern[str] | None = None) -> str:
    """A name as it was given, if it names a file of a folder and nothing else.

    `form` is what the whole name must match. Raises ValueError with the name.
    """
    if (
        not isinstance(name, str)
        or name in ("", ".", "..")
        or not _RESERVED.isdisjoint(name)
        or not name.isprintable()
        or len(os.fsencode(name)) > _MAX_NAME_BYTES
        or (form is not None and form.fullmatch(name) is None)
    ):
        raise ValueError(f"{name!r:.80} is not the name of a file of this folder")
    return name


def path_within(folder: Path, name: object, form: re.Pattern[str] | None = None) -> Path:
    """The path of a file that another file of the folder names; it need not be there.

    Links of the Hugging Face cache, whose snapshots are links to files of the same repository, are
    followed; other links out of the folder are not. Raises ValueError with the name.
    """
    path = folder / plain_name(name, form)
    if path.is_symlink() and leads_out(path, folder):
        raise ValueError(f"{name!r:.80} is a link out of its folder; copy the file there")
    return path


def leads_out(path: Path, folder: Path) -> bool:
    """Whether a path, links followed, is outside of a folder and of the cache that holds it."""
    target, home = Path(os.path.realpath(path)), Path(os.path.realpath(folder))
    return not any(target.is_relative_to(root) for root in _roots(home))


def _roots(folder: Path) -> list[Path]:
    """The folder and, for a snapshot of the Hugging Face cache, what its links lead to.

    Layout: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
    """
    is_snapshot = folder.parent.name == "snapshots" and folder.parents[1].name.startswith(
        ("models--", "datasets--")
    )
    return [folder, folder.parents[1] / "blobs"] if is_snapshot else [folder]
