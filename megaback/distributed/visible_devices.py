"""Number of GPUs that a process may use, from the driver's device files, without loading torch."""

import os
from pathlib import Path


def count_devices() -> int:
    """Number of GPUs for ranks here: by CUDA_VISIBLE_DEVICES, else by the driver's device files."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return count_device_files()


def count_device_files() -> int:
    """Number of GPUs, by the driver's device files."""
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])
