"""Check for the compiler that torch.compile needs."""

import os
import shutil

from data_pipeline.errors import BackendError


def require_compiler(device_type: str, option: str) -> None:
    """Raises BackendError if there is no compiler, on which torch.compile would fail minutes later.

    `option`: the setting that requests compilation, for the message.
    """
    if device_type == "cuda":  # Triton compiles the code that launches kernels
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    else:
        names = [os.environ.get("CXX") or "g++"]
    if not any(shutil.which(name) for name in names):
        raise BackendError(
            f"{option} needs a compiler, and {' or '.join(names)} is not on the PATH; "
            f"`apt-get install build-essential`, or unset {option}"
        )
