"""What our child processes import: what is installed, whatever the working directory holds.

`python -m` and `python -c` look into the working directory first, where a folder `tools/`, a file
`torch.py` or a clone of megaback would be taken for the package of that name.
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
    """The command line that runs an installed module with this Python, as `python -m` does.

    `has_option`: whether that Python knows -P, which keeps the working directory out.
    """
    if has_option:
        return [sys.executable, "-P", "-m", module, *words]
    return [sys.executable, "-c", _RUN_MODULE, module, *words]


@contextmanager
def safe_child_imports() -> Iterator[None]:
    """Processes that are started meanwhile do not import from the working directory.

    For those that multiprocessing starts, with `python -c`. Python 3.10 cannot be told so.
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
