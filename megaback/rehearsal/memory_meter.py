"""Peak memory of a rehearsed rank: resident memory of its process, or allocations on its GPU."""

import ctypes
import gc
from abc import ABC, abstractmethod
from pathlib import Path

import torch

# glibc's M_MMAP_THRESHOLD, M_TRIM_THRESHOLD and M_ARENA_MAX: freed memory is returned at once.
_MALLOC_OPTIONS = ((-3, 65_536), (-1, 65_536), (-8, 1))


class MemoryMeter(ABC):
    """Peak memory since the meter was made, above the memory at that time."""

    @abstractmethod
    def peak_bytes(self) -> int: ...

    @abstractmethod
    def restart(self) -> None:
        """Count only later peaks."""

    @abstractmethod
    def wait(self) -> None:
        """Wait until the device has done what it was asked for."""

    @classmethod
    def of(cls, device: torch.device) -> "MemoryMeter":
        return ProcessMemory() if device.type == "cpu" else DeviceMemory(device)


class ProcessMemory(MemoryMeter):
    """Resident memory of this process; only once per process."""

    def __init__(self) -> None:
        libc = ctypes.CDLL(None)
        for option, value in _MALLOC_OPTIONS:
            libc.mallopt(option, value)
        gc.collect()
        libc.malloc_trim(0)
        self._base_bytes = _status_bytes("VmRSS")
        self.restart()

    def peak_bytes(self) -> int:
        return _status_bytes("VmHWM") - self._base_bytes

    def restart(self) -> None:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM

    def wait(self) -> None:
        pass


class DeviceMemory(MemoryMeter):
    """Memory that PyTorch's allocator has given out on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._base_bytes = torch.cuda.memory_allocated(device)
        self.restart()

    def peak_bytes(self) -> int:
        return torch.cuda.max_memory_allocated(self._device) - self._base_bytes

    def restart(self) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def wait(self) -> None:
        torch.cuda.synchronize(self._device)


def _status_bytes(name: str) -> int:
    """A size of Linux's /proc/self/status, in bytes."""
    text = Path("/proc/self/status").read_text(encoding="utf-8")
    return (
        int(next(line for line in text.splitlines() if line.startswith(name + ":")).split()[1])
        << 10
    )
