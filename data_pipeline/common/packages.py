"""Packages that are optional, or absent from an installation without a network."""

from importlib.util import find_spec

from data_pipeline.errors import BackendError

SOURCE_PACKAGES = {
    "datasets": "data sets of the Hugging Face hub",
    "pyarrow": "parquet files",
}
"""Requirements that only sources of these kinds need. Training and use of models do not."""


def is_installed(name: str) -> bool:
    """Whether a module can be imported; it is not loaded."""
    try:
        return find_spec(name) is not None
    except ModuleNotFoundError:  # the package of a submodule
        return False
    except ValueError:  # it is loaded, but without a spec
        return True


def require_package(name: str, what: str, install: str | None = None, otherwise: str = "") -> None:
    """Raises BackendError when a package that `what` needs is not installed.

    `install`: words for pip, the package's name by default; `otherwise`: an alternative, appended
    to the message.
    """
    if not is_installed(name):
        raise BackendError(
            f"{what} needs {name}, which is not installed; "
            f"install it with `pip install {install or name}`{otherwise}"
        )
