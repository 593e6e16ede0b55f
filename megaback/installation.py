"""Checks that Python imports this installation's packages, and none that shadow them."""

import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from importlib.util import find_spec
from pathlib import Path

from megaback import own_process
from megaback.own_process import PACKAGES

ROOT = Path(own_process.ROOT)
"""The folder that the packages are installed in."""
HIDDEN = (
    "the folder `megaback` in the working directory hides the package of that name; start in "
    "another folder, or install megaback again with `pip install -e .`, which takes precedence"
)


def require_packages() -> None:
    """Raise ImportError if `data_pipeline` is another project's package."""
    spec = find_spec("data_pipeline")
    if spec is not None and spec.origin != str(
        Path(__file__).parents[1] / "data_pipeline" / "__init__.py"
    ):
        found = spec.origin or next(iter(spec.submodule_search_locations or []), "?")
        raise ImportError(
            f"Python imports {found} instead of megaback's own package data_pipeline; rename that "
            "one, remove its folder from Python's path (the folder of your script, PYTHONPATH), or "
            "install megaback in an environment without it"
        )


def is_whole() -> bool:
    """Whether `megaback` is the package, and not a folder of that name that hides it."""
    return getattr(sys.modules.get("megaback"), "__file__", None) is not None


def missing_module(name: str) -> str | None:
    """Reason why a module of megaback is missing; None for another package's module."""
    package = name.partition(".")[0]
    if package not in PACKAGES:
        return None
    found = getattr(sys.modules.get(package), "__file__", None) or ROOT / package
    return (
        f"there is no module {name} in {found}: another project's {package} hides megaback's, or "
        "files are missing; install megaback in an environment of its own"
    )


def hidden_by(folder: Path) -> list[str]:
    """Installed modules that Python would import from a folder instead, if started there.

    Checked are megaback's packages, the standard library and all installed packages.
    """
    return sorted(name for name in _names_in(folder) if _hides(folder, name))


def sharing_distributions() -> list[str]:
    """Other installed distributions with packages of our names, whose files may overwrite ours."""
    from importlib.metadata import packages_distributions

    found = packages_distributions()
    return sorted({other for name in PACKAGES for other in found.get(name, ())} - {"megaback"})


def _names_in(folder: Path) -> Iterator[str]:
    from importlib.metadata import packages_distributions  # slow to import

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
    # A folder without an __init__.py hides only what import hooks find, not modules on the path.
    found = here if here.origin else PathFinder.find_spec(name, [str(folder), *sys.path])
    return found is not None and (found.origin is None or Path(found.origin).is_relative_to(folder))
