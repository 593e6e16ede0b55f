"""How many GPUs a process may use, by what the driver shows: asked without loading torch."""

import os
from pathlib import Path


def count_devices() -> int:
    """GPUs that ranks here may use: CUDA_VISIBLE_DEVICES, else the device files of the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return count_device_files()


def count_device_files() -> int:
    """GPUs that the driver shows."""
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])
