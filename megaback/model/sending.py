"""Copies to and from a device for which the host does not wait, or only for their own work."""

import torch
from torch import Tensor


def sent(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on a device, or on a CPU the tensor itself.

    A GPU reads pinned memory by itself; for a copy from other memory the host waits.
    """
    if device.type != "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


class Arriving:
    """A tensor on its way to the host, after the work that its device has been given so far."""

    def __init__(self, tensor: Tensor) -> None:
        self._copied: torch.Event | None = None
        if tensor.device.type != "cpu":
            stream = torch.accelerator.current_stream(tensor.device)
            tensor = tensor.to("cpu", non_blocking=True)  # to pinned memory
            self._copied = stream.record_event()
        self._tensor = tensor

    def result(self) -> Tensor:
        """The tensor on the host. Waits until it has arrived, but not for later work."""
        if self._copied is not None:
            self._copied.synchronize()
            self._copied = None
        return self._tensor
