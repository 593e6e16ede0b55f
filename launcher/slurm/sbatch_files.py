"""The shipped sbatch files, and the values of their #SBATCH lines.

In a checkout they are in `slurm`; a package installs them in `share/megaback/slurm` of its
environment.
"""

import re
from pathlib import Path

from data_pipeline.common import shipped
from data_pipeline.errors import LaunchError

SHARED_FILES = ("ranks.sh", "network.sh")
"""Files that the sbatch files of training need beside them."""


def shipped_folder() -> Path:
    """The folder of the sbatch files. Raises LaunchError if it is not installed."""
    folder = shipped.shipped_folder("slurm", "train.sbatch")
    if folder is None:
        raise LaunchError(
            "this installation of megaback has no sbatch files; copy the folder slurm of its "
            "repository and give --files FOLDER"
        )
    return folder


def require_file(folder: Path, name: str) -> Path:
    """A file of the folder. Raises LaunchError if it or a file that it needs is missing."""
    needed = (name, *SHARED_FILES) if name in ("train.sbatch", "finetune.sbatch") else (name,)
    absent = [part for part in needed if not (folder / part).is_file()]
    if absent:
        raise LaunchError(
            f"{folder} has no {' and no '.join(absent)}; give --files the folder slurm of "
            "megaback's repository, or a whole copy of it"
        )
    return folder / name


def sbatch_value(path: Path, option: str) -> str | None:
    """The value of a long option in a file's #SBATCH lines, as Slurm reads them."""
    found = None
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.strip() and not line.startswith("#"):
            break  # sbatch stops at the first command
        match = re.match(rf"#SBATCH\s+--{re.escape(option)}[=\s]\s*(\S+)", line)
        if match:
            found = match[1]
    return found
