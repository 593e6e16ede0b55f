"""Processes that were started for megaback: what they import, and how they end at Ctrl-C.

A program that imports megaback as a library keeps its path and its signals. Until the path is in
order, nothing is imported here that Python has not loaded itself: the working directory may hold a
`typing.py`.
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
    """Whether Python was told to run the `megaback` script or, with -m, a module of ours.

    A module is ours if its package was found in ROOT: a `tools` of somebody else is not.
    """
    words = sys.argv[:1]
    if words not in (["-m"], ["-c"]) or len(sys.argv) > len(sys.orig_argv):
        return "".join(words).endswith(f"{os.sep}megaback")
    # While Python looks for a module, sys.argv has -m in the place of its name.
    package = sys.orig_argv[-len(sys.argv)].removeprefix("-m").partition(".")[0]
    file = getattr(sys.modules.get(package), "__file__", None)
    return package in PACKAGES and file is not None and _root_of(file) == ROOT


def put_packages_first() -> None:
    """Import nothing more from the working directory, and our packages before others of the name.

    Folders on the path that have another package of such a name (PYTHONPATH leads to a clone, a
    project with `tools`) come last. Processes that `multiprocessing` starts inherit the path.
    """
    has_working_directory = sys.argv[:1] == ["-m"] and not getattr(sys.flags, "safe_path", False)
    if has_working_directory and sys.path[0] in ("", os.getcwd()) and _real(sys.path[0]) != ROOT:
        del sys.path[0]
    others = [folder for folder in sys.path if _has_other_package(folder)]
    ours = [folder for folder in sys.path if folder not in others]
    if others and ROOT not in map(_real, ours):
        ours.append(ROOT)  # an import hook finds megaback
    sys.path[:] = [*ours, *others]


def end_at_ctrl_c() -> None:
    """From here on, Ctrl-C ends this process without a traceback, unless it is handled already."""
    import signal

    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave)


def _leave(*_: object) -> None:
    if "MEGABACK_LAUNCHER" not in os.environ:  # which speaks for its ranks
        os.write(2, b"megaback: interrupted\n")
    os._exit(130)


def _has_other_package(folder: str) -> bool:
    if _real(folder) == ROOT:
        return False
    paths = [os.path.join(folder, name) for name in PACKAGES]
    return any(os.path.isfile(f"{path}{end}") for path in paths for end in ("/__init__.py", ".py"))
