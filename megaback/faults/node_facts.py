"""Facts of a rank's node, measured before the first step: devices, memory, speed, versions.

`preflight` compares them across ranks.
"""

import hashlib
import importlib.metadata
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch

from megaback.distributed.rendezvous import node_name
from megaback.distributed.versions import library_versions
from megaback.installation import ROOT

_TRIES = 10
# On a CPU a product takes a few milliseconds of one core, so that some are not interrupted.
_MULTIPLY_SIZES = {"cuda": 8192, "cpu": 384}


@dataclass(frozen=True, kw_only=True)
class RankFacts:
    """One rank's node and device, as that rank sees them."""

    rank: int
    node: str
    device: str
    num_devices: int
    """GPUs that the rank sees, or cores that it may use."""
    memory_free_bytes: int
    """Free memory of the device or, on a CPU, of the host."""
    multiply_flops: float
    """Throughput of a matrix product, the best of several, in FLOP/s; 0 if the device cannot. On a
    CPU, of one core."""
    versions: dict[str, str]
    device_id: str | None = None
    """UUID of the GPU."""
    problem: str | None = None
    """Reason why the device cannot be used, if so."""
    clock_offset_s: float = field(default=0.0)
    """Offset of the rank's wall clock from the median of all, positive if it is ahead."""


def rank_facts(rank: int, device: torch.device) -> RankFacts:
    """Measure this rank's device, in well under a second."""
    flops, problem = _multiply_flops(device)
    device_id = None
    if device.type == "cuda":
        device_id = str(torch.cuda.get_device_properties(device).uuid)
        name, num_devices = torch.cuda.get_device_name(device), torch.cuda.device_count()
        memory_free_bytes = torch.cuda.mem_get_info(device)[0]
    else:
        name, num_devices = "cpu", len(os.sched_getaffinity(0))
        memory_free_bytes = psutil.virtual_memory().available
    return RankFacts(
        rank=rank,
        node=node_name(),
        device=name,
        num_devices=num_devices,
        memory_free_bytes=memory_free_bytes,
        multiply_flops=flops,
        versions=versions(),
        device_id=device_id,
        problem=problem,
    )


def versions() -> dict[str, str]:
    """Versions that must be the same on all nodes; `code` is a hash of megaback's modules."""
    found = library_versions()
    for package in ("flash-attn", "flash-attn-4"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "none"
    found["code"] = code_hash(ROOT)
    return found


def code_hash(root: Path) -> str:
    """Hash of every module that a rank may import, by its path below `root`."""
    digest = hashlib.sha256()
    for package in ("megaback", "data_pipeline"):
        for path in sorted((root / package).rglob("*.py")):
            name = path.relative_to(root).as_posix()
            digest.update(f"{name}\0".encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def multiply(left_NN: torch.Tensor, right_NN: torch.Tensor) -> torch.Tensor:
    """The product that is timed; waits for the device."""
    product_NN = left_NN @ right_NN
    if product_NN.device.type == "cuda":
        torch.cuda.synchronize(product_NN.device)
    return product_NN


def _multiply_flops(device: torch.device) -> tuple[float, str | None]:
    """Throughput of the fastest of several products in FLOP/s, and the device's problem, if any."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # with more, ranks that share cores would seem slow
    size = _MULTIPLY_SIZES[device.type]
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        ones_NN = torch.ones(size, size, dtype=dtype, device=device)
        product_NN = multiply(ones_NN, ones_NN)  # also loads the kernels
        if not bool((product_NN == size).all()):
            return 0.0, f"computes wrong products: a product of ones is not {size} everywhere"
        seconds = min(_timed(lambda: multiply(ones_NN, ones_NN)) for _ in range(_TRIES))
    except RuntimeError as error:  # what the driver reports
        return 0.0, f"cannot multiply: {' '.join(str(error).split())}"
    finally:
        torch.set_num_threads(threads)
    return 2 * size**3 / seconds, None


def _timed(function: Callable[[], object]) -> float:
    started = time.perf_counter()
    function()
    return time.perf_counter() - started
