"""Import path of child processes: installed packages, never the working directory.

`python -m` and `python -c` search the working directory first, where a folder `tools/`, a file
`torch.py` or a clone of megaback would shadow the package of that name.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_SAFE_PATH = "PYTHONSAFEPATH"  # Python 3.11 and later
_RUN_MODULE = (
    "import sys; del sys.path[0]; import runpy; "
    "runpy.run_module(sys.argv.pop(1), run_name='__main__', alter_sys=True)"
)


def module_command(
    module: str, *words: str, has_option: bool = sys.version_info >= (3, 11)
) -> list[str]:
    """Command line that runs an installed module with this Python, as `python -m` does.

    `has_option`: whether this Python has -P, which excludes the working directory.
    """
    if has_option:
        return [sys.executable, "-P", "-m", module, *words]
    return [sys.executable, "-c", _RUN_MODULE, module, *words]


@contextmanager
def safe_child_imports() -> Iterator[None]:
    """Keep the working directory out of the import path of processes started in the block.

    For multiprocessing, which runs `python -c`. Without effect on Python 3.10.
    """
    before = os.environ.get(_SAFE_PATH)
    os.environ[_SAFE_PATH] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop(_SAFE_PATH, None)  # threads may start processes at the same time
        else:
            os.environ[_SAFE_PATH] = before
