"""Process group of one process that is one rank of many: collectives are counted, not sent.

The other ranks contribute zeros: a sum is this rank's term, and their parts of a gathered tensor
are zero, or unchanged if it is gathered in place. Broadcasts leave the tensor as it is. Numbers are
finite and have the right shapes, but they are not those of a run. torch's own `fake` group leaves
outputs uninitialized, so that steps may be skipped for a non-finite gradient norm.

In the control group all ranks send what this rank sends, since its messages are parsed.
"""

# ruff: noqa: ARG002 - torch's signatures
# mypy: disable-error-code="override, assignment"

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain
from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch._C import _distributed_c10d as c10d
from torch.futures import Future

_BACKEND = "rehearsal"


@dataclass(frozen=True)
class Collective:
    """A kind of collective in a phase of a step."""

    step: int
    phase: str
    kind: str
    group: str
    """`control`, `engine` or `node`: see `report.Traffic`."""


class CollectiveLog:
    """Collectives by step, phase and kind: their number, and the bytes that this rank would send.

    Bytes are those of ring algorithms, as in `planning.network`.
    """

    def __init__(self) -> None:
        self.step, self.phase = 0, "starting"
        self.calls: Counter[Collective] = Counter()
        self.sent_bytes: Counter[Collective] = Counter()

    def add(self, kind: str, sent_bytes: float, group: str) -> None:
        one = Collective(self.step, self.phase, kind, group)
        self.calls[one] += 1
        self.sent_bytes[one] += round(sent_bytes)


class RehearsalGroup(dist.ProcessGroup):
    """The group of one rank; collectives complete at once."""

    def __init__(
        self, rank: int, size: int, log: CollectiveLog, name: str | None = "engine"
    ) -> None:
        """`name`: as in `report.Traffic`; None: found by the ranks of the group."""
        super().__init__(rank, size)  # type: ignore[call-arg]
        self._rank, self._size, self._log, self._name = rank, size, log, name

    def size(self) -> int:
        return self._size

    def getBackendName(self) -> str:  # noqa: N802 (torch's name)
        return _BACKEND

    @property
    def group_name(self) -> str:
        """The name by which operators find the group."""
        return f"{_BACKEND} {id(self)}"

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._done("all-reduce", 2 * self._others * _bytes_of(tensors), tensors)

    def allreduce_coalesced(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self.allreduce(tensors)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._done("reduce", self._others * _bytes_of(tensors), tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> Any:
        return self._done("broadcast", self._others * _bytes_of(tensors), tensors)

    def barrier(self, opts: Any = None) -> Any:
        return self._done("barrier", 0, [])

    def allgather(
        self, outputs: list[list[Tensor]], tensors: list[Tensor], opts: Any = None
    ) -> Any:
        for received, own in zip(outputs, tensors, strict=True):
            self._fill(received, own)
        flat = list(chain.from_iterable(outputs))
        return self._done("all-gather", self._others * _bytes_of(flat), flat)

    def all_gather_single(self, output: Tensor, own: Tensor, opts: Any = None) -> Any:
        self._fill(list(output.view(self._size, -1)), own.reshape(-1))
        return self._done("all-gather", self._others * output.nbytes, [output])

    def all_gather_single_coalesced(
        self, outputs: list[Tensor], tensors: list[Tensor], opts: Any = None
    ) -> Any:
        for output, own in zip(outputs, tensors, strict=True):
            self._fill(list(output.view(self._size, -1)), own.reshape(-1))
        return self._done("all-gather", self._others * _bytes_of(outputs), outputs)

    def reduce_scatter(
        self, outputs: list[Tensor], inputs: list[list[Tensor]], opts: Any = None
    ) -> Any:
        for output, parts in zip(outputs, inputs, strict=True):
            output.copy_(parts[self._rank])
        sent = self._others * _bytes_of(list(chain.from_iterable(inputs)))
        return self._done("reduce-scatter", sent, outputs)

    def reduce_scatter_single(self, output: Tensor, whole: Tensor, opts: Any = None) -> Any:
        output.reshape(-1).copy_(whole.reshape(self._size, -1)[self._rank])
        return self._done("reduce-scatter", self._others * whole.nbytes, [output])

    def reduce_scatter_single_coalesced(
        self, outputs: list[Tensor], inputs: list[Tensor], opts: Any = None
    ) -> Any:
        for output, whole in zip(outputs, inputs, strict=True):
            output.reshape(-1).copy_(whole.reshape(self._size, -1)[self._rank])
        return self._done("reduce-scatter", self._others * _bytes_of(inputs), outputs)

    def all_to_all_single(
        self,
        output: Tensor,
        own: Tensor,
        output_sizes: Sequence[int],
        input_sizes: Sequence[int],
        opts: Any = None,
    ) -> Any:
        equal = [len(own) // self._size] * self._size
        output_sizes, input_sizes = output_sizes or equal, input_sizes or equal
        output.zero_()
        first = self._rank
        kept = own[sum(input_sizes[:first]) : sum(input_sizes[: first + 1])]
        start = sum(output_sizes[:first])
        output[start : start + len(kept)].copy_(kept)
        return self._done("all-to-all", own.nbytes - kept.nbytes, [output])

    # torch 2.9 to 2.12 has other names.
    _allgather_base = all_gather_single
    allgather_into_tensor_coalesced = all_gather_single_coalesced
    _reduce_scatter_base = reduce_scatter_single
    reduce_scatter_tensor_coalesced = reduce_scatter_single_coalesced
    alltoall_base = all_to_all_single

    @property
    def _others(self) -> float:
        return (self._size - 1) / self._size

    def _fill(self, parts: Sequence[Tensor], own: Tensor) -> None:
        """Write the parts that the ranks gather, of which `own` is this rank's."""
        is_in_place = _storage(parts[self._rank]) == _storage(own)
        for rank, part in enumerate(parts):
            if rank == self._rank or self._name == "control":
                part.copy_(own)
            elif not is_in_place:
                part.zero_()

    def _done(self, kind: str, sent_bytes: float, tensors: list[Tensor]) -> Any:
        if self._name is None:
            ranks = dist.get_process_group_ranks(self)
            is_consecutive = ranks[-1] - ranks[0] == len(ranks) - 1
            self._name = "node" if is_consecutive else "engine"
        if self._size > 1:
            self._log.add(kind, sent_bytes, self._name)
        devices = {tensor.device for tensor in tensors if tensor.device.type != "cpu"}
        future: Future[list[Tensor]] = Future(devices=list(devices))
        future.set_result(tensors)
        return c10d._create_work_from_future(future)  # type: ignore[attr-defined]


def join(rank: int, size: int, log: CollectiveLog) -> Any:
    """Join torch's default group as one rank of many, alone; returns a control group."""
    groups = 0

    def create(_store: Any, group_rank: int, group_size: int, _timeout: timedelta) -> Any:
        nonlocal groups
        groups += 1
        # The first is the default group; `join` creates the second.
        name = "control" if groups == 2 else "engine" if group_size == size else None
        return RehearsalGroup(group_rank, group_size, log, name)

    dist.Backend.register_backend(_BACKEND, create, devices=["cpu", "cuda"])
    dist.init_process_group(_BACKEND, store=c10d.HashStore(), rank=rank, world_size=size)
    return dist.new_group(backend=_BACKEND)


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _bytes_of(tensors: Sequence[Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
