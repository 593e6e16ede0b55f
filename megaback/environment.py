"""Environment variables of a rank, and of Slurm's job."""

import os
from pathlib import Path

LAUNCHER_VARIABLE = "MEGABACK_LAUNCHER"
"""Process id of the launcher; a rank ends when that process does."""


HOST_VARIABLE = "MEGABACK_HOST"
"""Name of this node in the hostfile."""

_ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")

# The second names are of versions before 2.9.
_RECORDER_VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")
_DUMP_VARIABLES = ("TORCH_FR_DUMP_TEMP_FILE", "TORCH_NCCL_DEBUG_INFO_TEMP_FILE")


def slurm_job() -> tuple[str | None, int]:
    """The Slurm job of this process, None outside of one, and how often it was restarted.

    An element of an array is ARRAY_INDEX: its job id may be the whole array's.
    """
    job, array, index = (
        os.environ.get(f"SLURM_{name}") for name in ("JOB_ID", "ARRAY_JOB_ID", "ARRAY_TASK_ID")
    )
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    if job is not None and array is not None and index is not None:
        job = f"{array}_{index}"
    return job, int(restarts) if restarts.isdecimal() else 0


def use_expandable_segments() -> None:
    """Let PyTorch's allocator on GPUs grow its segments, which fragments less memory.

    To be called before torch is imported. A setting of the user's is kept.
    """
    if not any(name in os.environ for name in _ALLOCATOR_VARIABLES):
        os.environ[_ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def use_flight_recorder(folder: Path) -> None:
    """Let PyTorch record the last collectives, and dump NCCL's in a folder when one times out.

    To be called before the first process group. Settings of the user's are kept.
    """
    if not any(name in os.environ for name in _RECORDER_VARIABLES):
        os.environ[_RECORDER_VARIABLES[0]] = "2000"
    if not any(name in os.environ for name in _DUMP_VARIABLES):
        os.environ[_DUMP_VARIABLES[0]] = str(folder / "nccl-rank-")
    os.environ.setdefault("TORCH_NCCL_DUMP_ON_TIMEOUT", "1")
