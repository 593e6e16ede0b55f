"""CUDA graphs: work that is captured once and replayed, hundreds of kernels in one launch.

Only CUDA itself is here, so that all that can be tested without it is elsewhere.
"""

from collections.abc import Callable
from typing import Any

import torch

Work = Callable[[], None]
Capture = Callable[[Work, Work], Work]
"""(compute, commit) -> the replay of both.

`compute` may run more than once, as it does before the capture; `commit`, which changes what the
next step begins with, only when replayed. Both read and write tensors that are never moved.
"""


def why_no_graphs(device: torch.device) -> str | None:
    """Reason why work on a device cannot be captured; None if it can."""
    if device.type != "cuda":
        return f"{device} has no CUDA graphs"
    if torch.version.hip is not None:
        return "they were not tried on ROCm"
    return None


class CudaCapture:
    """Captures work on one device. All graphs share one pool of memory, and replay in turn."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._side: tuple[Any, Any] | None = None

    def __call__(self, compute: Work, commit: Work) -> Work:
        with torch.cuda.device(self._device):
            if self._side is None:
                stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
                self._side = stream, torch.cuda.graph_pool_handle()
            stream, pool = self._side
            current = torch.cuda.current_stream()
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                compute()  # libraries allocate what they need, which a capture would not allow
            current.wait_stream(stream)
            graph = torch.cuda.CUDAGraph()
            # Other threads, such as those that pin memory, may call CUDA meanwhile.
            with torch.cuda.graph(
                graph, pool=pool, stream=stream, capture_error_mode="thread_local"
            ):
                compute()
                commit()
        replay: Work = graph.replay
        return replay
