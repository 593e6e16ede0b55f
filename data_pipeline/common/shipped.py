"""Data folders that ship with megaback: `configs` and `slurm`.

In a checkout they are in its root; a package installs them as `share/megaback/…`.
"""

from importlib import metadata
from pathlib import Path

import data_pipeline

_ROOT = Path(data_pipeline.__path__[0]).resolve().parent


def shipped_folder(name: str, member: str) -> Path | None:
    """The folder `name`, which contains the file `member`; None if it is not installed."""
    if (_ROOT / name / member).is_file():
        return _ROOT / name
    try:
        files = metadata.files("megaback") or ()
    except metadata.PackageNotFoundError:
        return None
    wanted = f"share/megaback/{name}/{member}"
    found = [Path(str(file.locate())) for file in files if str(file).endswith(wanted)]
    return found[0].parent if found and found[0].is_file() else None


def config_path(name: str) -> Path:
    """Path of a shipped config, relative to the working directory if possible."""
    folder = shipped_folder("configs", name)
    if folder is None:
        return Path("configs") / name
    path = folder / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
