"""Limits of devices and their hosts: peak FLOP/s, precisions, memory."""

import resource
import socket
import sys
from pathlib import Path

import torch

from data_pipeline.errors import BackendError
from megaback.planning.devices import CPU, devices_named_like
from megaback.planning.host_memory import free_host_memory_bytes, host_memory_bytes
from megaback.planning.memory_room import AvailableMemory


def device_peak_flops(device: torch.device, precision: str) -> float | None:
    """Peak FLOP/s of a known GPU in a run's precision; None for others."""
    if device.type != "cuda":
        return None
    known = devices_named_like(torch.cuda.get_device_name(device))
    return known[0].peak_flops(precision) if known else None


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory of this process: allocated on its GPU, or resident on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:  # ru_maxrss includes the parent's peak at the time of the fork
        for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def available_memory(device: torch.device) -> AvailableMemory:
    """Memory of this rank's GPU or, on a CPU, of its host."""
    host = socket.gethostname()
    if device.type == "cuda":
        found = torch.cuda.get_device_properties(device)
        return AvailableMemory(host, found.name, found.total_memory)
    return AvailableMemory(host, CPU, host_memory_bytes())


def require_precision(precision: str, device: torch.device) -> None:
    """Raises BackendError for a precision that the device does not support."""
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported(False):
        raise BackendError(
            f"training.precision is bf16, which {torch.cuda.get_device_name(device)} does not "
            "support; set training.precision=fp32"
        )


_OPTIMIZER_BYTES = 16  # fp32 weight, gradient and two moments
_WEIGHT_BYTES = {"bf16": 2, "fp32": 4}


def require_host_memory(
    offload: str, num_parameters: int, precision: str, ranks_here: int, world_size: int
) -> None:
    """Raises BackendError, with both sizes, if this host cannot hold what its ranks offload."""
    if offload == "none":
        return
    bytes_per_parameter = _OPTIMIZER_BYTES
    if offload == "parameters":
        bytes_per_parameter += _WEIGHT_BYTES[precision]
    needed = num_parameters * bytes_per_parameter * ranks_here / world_size
    available = free_host_memory_bytes()
    if needed > available:
        raise BackendError(
            f"zero.offload {offload} keeps {needed / 1e9:.1f} GB in this host's memory, of which "
            f"{available / 1e9:.1f} GB are free; use more hosts, or zero.offload=none"
        )
