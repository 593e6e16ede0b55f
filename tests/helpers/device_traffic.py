"""Work that the host gives to a device, and the lines that do."""

import sys
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from tests.helpers.paths import ROOT

_HELPERS = {
    "device_traffic.py",
    "fake_gpu.py",
    "fake_gpu_device.py",
    "fake_graphs.py",
    "fake_streams.py",
}


@dataclass
class Traffic:
    """Work that the host gave to the device. Entries name the operation and the line."""

    kernels: Counter[str] = field(default_factory=Counter)
    """Operations that compute or copy on the device, each counted as one kernel."""
    to_device: list[str] = field(default_factory=list)
    """Copies from the host to the device."""
    to_host: list[str] = field(default_factory=list)
    syncs: list[str] = field(default_factory=list)
    """Waits of the host for the device: values that it reads, and copies that are not async."""

    @property
    def num_kernels(self) -> int:
        return self.kernels.total()

    def __str__(self) -> str:
        kernels = ", ".join(f"{count} {name}" for name, count in self.kernels.most_common())
        return "\n".join(
            (
                f"{self.num_kernels} kernels: {kernels}",
                *(f"to the device: {entry}" for entry in self.to_device),
                *(f"to the host: {entry}" for entry in self.to_host),
                *(f"sync: {entry}" for entry in self.syncs),
            )
        )


def at_line(what: str) -> str:
    """The operation, with the line of the product or the test that did it."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if path.startswith(str(ROOT)) and ".venv" not in path and Path(path).name not in _HELPERS:
            return (
                f"{what} in {frame.f_code.co_name}, {path[len(str(ROOT)) + 1 :]}:{frame.f_lineno}"
            )
        frame = frame.f_back  # type: ignore[assignment]
    return what
