"""Facts of the machine, as JSON: `python -m benchmarks.gpu_test.facts`.

A process of its own, as the one that starts the parts does not use the GPU.
"""

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from megaback.tracking.code_version import code_version

_PACKAGES = (
    "deepspeed",
    "numpy",
    "triton",
    "transformers",
    "flash-attn",
    "flash-attn-4",
    "pytest",
)
_QUERY = "name,uuid,driver_version,memory.total,power.limit,clocks.max.sm"


def machine_facts() -> dict[str, Any]:
    """Devices, driver, versions and revision."""
    has_cuda = torch.cuda.is_available()
    return {
        "device": "cuda" if has_cuda else "cpu",
        "devices": [_device(number) for number in range(torch.cuda.device_count())],
        "nvidia_smi": _nvidia_smi(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": _library_version(torch.backends.cudnn.version) if has_cuda else None,
        "nccl": _library_version(torch.cuda.nccl.version) if has_cuda else None,
        "packages": {name: _version(name) for name in _PACKAGES},
        "system": platform.platform(),
        "cores": len(os.sched_getaffinity(0)),
        **code_version(),
    }


def _device(number: int) -> dict[str, Any]:
    found = torch.cuda.get_device_properties(number)
    return {
        "name": found.name,
        "memory_bytes": found.total_memory,
        "compute_capability": f"{found.major}.{found.minor}",
        "multiprocessors": found.multi_processor_count,
    }


def _library_version(version_of: Callable[[], Any]) -> str:
    found = version_of()
    return ".".join(map(str, found)) if isinstance(found, tuple) else str(found)


def _nvidia_smi() -> list[str]:
    if not shutil.which("nvidia-smi"):
        return []
    words = ["nvidia-smi", f"--query-gpu={_QUERY}", "--format=csv,noheader"]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=30)
    return done.stdout.strip().splitlines() if done.returncode == 0 else []


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    print(json.dumps(machine_facts()))
