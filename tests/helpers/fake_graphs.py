"""Graphs of the fake GPU: operations that are recorded once and repeated without Python.

As with CUDA's, nothing that is captured is computed then. A replay repeats the operations with the
same memory, and with the numbers that Python gave them at the capture. What a capture may not do is
an error: a wait of the host, and a copy between the devices. After a replay, memory that the graph
allocated is overwritten.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from megaback.inference.cuda_graph import Work


class Recording:
    """Operations on the memory of the fake GPU, as CPU tensors."""

    def __init__(self) -> None:
        self._operations: list[tuple[Any, Any, Any, Any]] = []
        self._own: dict[int, Tensor] = {}
        """Tensors that the graph allocated, by their address."""
        self._before: dict[int, tuple[Tensor, Tensor]] = {}
        """Other memory that it writes, and a copy of its bytes."""

    def run(self, operation: Any, args: Any, kwargs: Any, written: list[Tensor]) -> Any:
        """Note an operation. Its results hold their shapes; other memory is restored later."""
        for tensor in written:
            if _address(tensor) not in self._own | self._before:
                all_bytes = torch.empty(0, dtype=torch.uint8).set_(tensor.untyped_storage())
                self._before[_address(tensor)] = all_bytes, all_bytes.clone()
        result = operation(*args, **kwargs)
        given = {_address(one) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in given:
                self._own.setdefault(_address(tensor), tensor)
        self._operations.append((operation, args, kwargs, result))
        return result

    def end(self) -> None:
        """Restore what a capture does not change."""
        for memory, copied in self._before.values():
            memory.copy_(copied)
        self._forget()

    def repeat(self) -> list[int]:
        """Compute; returns the addresses of other memory that was written."""
        for operation, args, kwargs, result in self._operations:
            again = operation(*args, **kwargs)
            if operation.is_view or operation._schema.is_mutable:
                continue
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and "empty" not in operation._schema.name:
                    old.copy_(new)
        self._forget()
        return list(self._before)

    def _forget(self) -> None:
        for tensor in self._own.values():
            if tensor.is_floating_point():
                tensor.fill_(torch.nan)
            elif tensor.dtype is not torch.bool:
                tensor.fill_(-(1 << 6))


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


class FakeCapture:
    """A stand-in for `CudaCapture`; `record` returns the replay of work."""

    def __init__(self, record: Callable[[Work], Work]) -> None:
        self._record = record
        self.num_graphs = 0

    def __call__(self, compute: Work, commit: Work) -> Work:
        compute()

        def both() -> None:
            compute()
            commit()

        self.num_graphs += 1
        return self._record(both)
