"""Which megaback Python imports: what is installed, or what the working directory has by its name.

Commands start their processes so that only what is installed counts
(`data_pipeline.common.import_path`). What a person starts, `python -m megaback.train`
or a script that imports megaback, is put right here where it can be, and else refused before it
does anything.
"""

import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
"""The folder that the packages are installed in."""
PACKAGES = ("megaback", "data_pipeline", "launcher", "tools")
HIDDEN = (
    "the folder `megaback` in the working directory hides the package of that name; start in "
    "another folder, or install megaback once more with `pip install -e .`, which then comes first"
)
_START_OF_PIPELINE = Path("data_pipeline", "__init__.py")


def leave_working_directory() -> None:
    """Import nothing more from the folder that `python -m` has put first."""
    if getattr(sys.flags, "safe_path", False) or not sys.path:
        return
    if sys.path[0] in ("", str(Path.cwd())) and Path(sys.path[0]).resolve() != ROOT:
        del sys.path[0]


def require_packages() -> None:
    """Raise ImportError if the package that megaback is built on is somebody else's."""
    spec = find_spec("data_pipeline")
    if spec is not None and spec.origin != str(Path(__file__).parents[1] / _START_OF_PIPELINE):
        found = spec.origin or next(iter(spec.submodule_search_locations or []), "?")
        raise ImportError(
            f"megaback needs its own package data_pipeline, and Python finds {found} in its place; "
            "start Python in another folder, or rename that one"
        )


def is_whole() -> bool:
    """Whether `megaback` is the package, and not a mere folder of that name over it."""
    return getattr(sys.modules.get("megaback"), "__file__", None) is not None


def hidden_by(folder: Path) -> list[str]:
    """Modules that Python would take from a folder, if started there, in place of installed ones.

    Of megaback's packages, of Python's own modules and of everything that is installed.
    """
    return sorted(name for name in _names_in(folder) if _hides(folder, name))


def _names_in(folder: Path) -> Iterator[str]:
    from importlib.metadata import packages_distributions  # which takes a while

    installed = {*PACKAGES, *sys.stdlib_module_names, *packages_distributions()}
    try:
        entries = list(folder.iterdir())
    except OSError:
        return
    yield from installed & {path.name if path.is_dir() else path.stem for path in entries}


def _hides(folder: Path, name: str) -> bool:
    here = PathFinder.find_spec(name, [str(folder)])
    if here is None or (name in PACKAGES and folder.resolve() == ROOT):
        return False
    # A folder without an __init__.py hides only what an import hook finds, not what is on the path.
    found = here if here.origin else PathFinder.find_spec(name, [str(folder), *sys.path])
    return found is not None and (found.origin is None or Path(found.origin).is_relative_to(folder))
