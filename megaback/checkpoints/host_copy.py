"""Tensors copied to one block of host memory of exactly their size, page-locked for a GPU.

PyTorch's own pinned memory rounds every tensor up to a power of two.
"""

import logging
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

_LOG = logging.getLogger("megaback.checkpoints")
_ALIGNED_BYTES = 16


class HostCopy(Mapping[str, Tensor]):
    """Copies of tensors on the host, by name; each copy overwrites the one before."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        """Allocate memory for tensors such as these."""
        starts, num_bytes = {}, 0
        for name, tensor in tensors.items():
            starts[name] = num_bytes
            num_bytes += -(-tensor.nbytes // _ALIGNED_BYTES) * _ALIGNED_BYTES
        self._block = torch.empty(num_bytes, dtype=torch.uint8)
        self._is_locked = False
        if any(tensor.device.type != "cpu" for tensor in tensors.values()):
            self._is_locked = page_locked(self._block)
        self._copies = {
            name: self._block[start : start + tensors[name].nbytes]
            .view(tensors[name].dtype)
            .view(tensors[name].shape)
            for name, start in starts.items()
        }

    def fill(self, tensors: Mapping[str, Tensor]) -> None:
        """Copy the tensors' values, and wait once, until all have arrived."""
        devices = set()
        for name, tensor in tensors.items():
            self._copies[name].copy_(tensor, non_blocking=True)
            if tensor.device.type != "cpu":
                devices.add(tensor.device)
        for device in devices:
            torch.accelerator.current_stream(device).record_event().synchronize()

    def release(self) -> None:
        """Unlock the memory, before it is freed."""
        if self._is_locked:
            _cuda().cudaHostUnregister(self._block.data_ptr())
            self._is_locked = False

    def __getitem__(self, name: str) -> Tensor:
        return self._copies[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._copies)

    def __len__(self) -> int:
        return len(self._copies)


def page_locked(block: Tensor) -> bool:
    """Lock host memory, which a GPU then reads and writes by itself; False if that is refused."""
    error = _cuda().cudaHostRegister(block.data_ptr(), block.nbytes, 0)
    if int(error):
        _LOG.warning(
            "%.1f GB of host memory could not be page-locked (CUDA error %d); checkpoints are "
            "copied to it slower",
            block.nbytes / 1e9,
            int(error),
        )
    return not int(error)


def _cuda() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]
