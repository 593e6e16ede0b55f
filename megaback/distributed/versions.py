"""Versions of the libraries that affect numerical results."""

import platform

import numpy as np
import torch


def library_versions() -> dict[str, str]:
    """Versions of megaback, Python and the libraries that affect numerical results."""
    import deepspeed

    from megaback import __version__

    return {
        "megaback": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": deepspeed.__version__,
        "numpy": np.__version__,
    }
