"""The compiler that torch.compile calls: a program that is there or not."""

import os
import shutil

from data_pipeline.errors import BackendError


def require_compiler(device_type: str, option: str) -> None:
    """Raises BackendError where torch.compile would find no compiler, minutes later.

    `option` is what the user leaves out to do without.
    """
    if device_type == "cuda":  # Triton's, for the code that launches kernels
        names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "clang", "cc"]
    else:
        names = [os.environ.get("CXX") or "g++"]
    if not any(shutil.which(name) for name in names):
        raise BackendError(
            f"{option} needs a compiler, and {' or '.join(names)} is not on the PATH; "
            f"`apt-get install build-essential`, or leave {option} out"
        )
