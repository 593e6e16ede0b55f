"""Folders of files that come with megaback beside its modules: `configs` and `slurm`.

In a checkout they lie in its root; a package brings them as `share/megaback/…` of its environment.
"""

from importlib import metadata
from pathlib import Path

import data_pipeline

_ROOT = Path(data_pipeline.__path__[0]).resolve().parent


def shipped_folder(name: str, member: str) -> Path | None:
    """The folder of that name, known by one of its files; None where it is not installed."""
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
    """A config of ours as a person here would type it."""
    folder = shipped_folder("configs", name)
    if folder is None:
        return Path("configs") / name
    path = folder / name
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
