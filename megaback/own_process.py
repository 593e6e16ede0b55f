"""Import path and Ctrl-C of processes that run megaback's own commands.

A program that imports megaback as a library keeps its path and its signal handlers. Until the path
is set, only modules that Python has loaded itself are imported here: the working directory may
contain a `typing.py`.
"""

import os
import sys
from os.path import realpath as _real

PACKAGES = ("megaback", "data_pipeline", "launcher", "tools")


def _root_of(file: str) -> str:
    return os.path.dirname(os.path.dirname(_real(file)))


ROOT = _root_of(__file__)
"""The folder that the packages are installed in."""


def is_own_process() -> bool:
    """Whether Python runs the `megaback` script or, with -m, a module of ours.

    A module is ours if its package was found in ROOT: another project's `tools` is not.
    """
    words = sys.argv[:1]
    if words not in (["-m"], ["-c"]) or len(sys.argv) > len(sys.orig_argv):
        return "".join(words).endswith(f"{os.sep}megaback")
    # While Python looks for a module, sys.argv has -m instead of its name.
    package = sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None)
    return package in PACKAGES and file is not None and _root_of(file) == ROOT


def put_packages_first() -> None:
    """Remove the working directory from the path, and move folders with packages of our names last.

    Examples of such folders are a clone in PYTHONPATH and a project with `tools`. Processes that
    `multiprocessing` starts inherit the path.
    """
    has_working_directory = sys.argv[:1] == ["-m"] and not getattr(sys.flags, "safe_path", False)
    if has_working_directory and sys.path[0] in ("", os.getcwd()) and _real(sys.path[0]) != ROOT:
        del sys.path[0]
    others = [folder for folder in sys.path if _has_other_package(folder)]
    ours = [folder for folder in sys.path if folder not in others]
    if others and ROOT not in map(_real, ours):
        ours.append(ROOT)  # an import hook finds megaback
    sys.path[:] = [*ours, *others]


def skip_collections_at_exit() -> None:
    """Let the interpreter's teardown collect nothing of what ends with the process anyway.

    With torch, the collections of the teardown take most of half a second.
    """
    import atexit
    import gc

    atexit.register(gc.freeze)


def end_at_ctrl_c() -> None:
    """End this process at Ctrl-C without a traceback, unless a handler is installed already."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> None:
    if "MEGABACK_LAUNCHER" not in os.environ:  # a launcher reports it once for all ranks
        os.write(2, b"megaback: interrupted\n")
    os._exit(130)


def _has_other_package(folder: str) -> bool:
    if _real(folder) == ROOT:
        return False
    paths = [os.path.join(folder, name) for name in PACKAGES]
    return any(os.path.isfile(f"{path}{end}") for path in paths for end in ("/__init__.py", ".py"))
