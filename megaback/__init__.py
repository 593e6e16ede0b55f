"""The model that writes backwards, and how it learns."""

import os
import signal
import sys

if (
    sys.argv[:1] == ["-m"] or "".join(sys.argv[:1]).endswith(f"{os.sep}megaback")
) and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The process of a command or a rank: from here on, Ctrl-C ends it without a traceback.

    def _leave(*_: object) -> None:
        if "MEGABACK_LAUNCHER" not in os.environ:  # which speaks for its ranks
            os.write(2, b"megaback: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, _leave)

from typing import TYPE_CHECKING, Any

from megaback.installation import leave_working_directory, require_packages

if TYPE_CHECKING:
    from pathlib import Path

    from megaback.inference.writer import Writer
    from megaback.scoring.scorer import Scorer

__version__ = "0.1.0"

if sys.argv[:1] == ["-m"]:  # as long as `python -m megaback…` looks for what it is to run
    leave_working_directory()
require_packages()


def load(folder: "str | Path", **how: Any) -> "Writer":
    """A model's folder, a run or a checkpoint, ready to write.

    See `megaback.inference.writer.load_writer`.

    >>> megaback.load("models/xcoax").complete_backwards("the end.")  # doctest: +SKIP
    """
    from megaback.inference.writer import load_writer  # torch is loaded when it is needed

    return load_writer(folder, **how)


def load_scorer(folder: "str | Path", **how: Any) -> "Scorer":
    """A model that scores pairs of questions and answers.

    See `megaback.scoring.scorer.load_scorer`.
    """
    from megaback.scoring.scorer import load_scorer as load

    return load(folder, **how)
