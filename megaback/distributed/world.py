"""Process group of the ranks: control messages, collective errors and exit.

Control messages use gloo on the CPU, separate from the gradients' backend, so that they never wait
for a GPU. They are tensors of numbers, or JSON (`messages`): torch's object collectives would
unpickle received data, which can execute code.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from data_pipeline.common.command import report, system_error
from data_pipeline.common.file_limits import raise_file_limit
from data_pipeline.common.interrupts import leave
from data_pipeline.common.logging_setup import show_rank
from data_pipeline.errors import BackendError, LaunchError, MegabackError
from megaback.distributed.messages import decode, encode
from megaback.distributed.rendezvous import meet, name_rank, node_name
from megaback.distributed.visible_devices import count_device_files, count_devices, names_in

_Result = TypeVar("_Result")
_LOG = logging.getLogger("megaback.distributed")
_MAX_BYTES_OF_EACH = 1 << 20
_MAX_BYTES_OF_FIRST = 1 << 28
_CODES = 256
_NO_ERROR = (1 << 63) - 1


class CollectiveExit(SystemExit):
    """Exit of all ranks together; `error` is set on the rank that reported it."""

    def __init__(self, code: int | None, error: MegabackError | None) -> None:
        super().__init__(code)
        self.error = error


class Reduction:
    """An all-reduce that is under way: collective when it is created, and local afterwards."""

    def __init__(self, values: Tensor, op: Any, group: Any) -> None:
        """`values` is replaced."""
        self._values = values
        self._work = dist.all_reduce(values, op, group, async_op=True)
        self._copied: torch.Event | None = None
        self._result: list[float] | None = None

    def fetch(self) -> None:
        """Start to copy the values from a GPU, after the work that it has been given.

        Once the host has waited for later work, `result` does not wait.
        """
        if self._values.device.type != "cpu":
            self._work.wait()  # the GPU's stream waits, not the host
            stream = torch.accelerator.current_stream(self._values.device)
            self._values = self._values.to("cpu", non_blocking=True)
            self._copied = stream.record_event()

    def result(self) -> list[float]:
        """The values over all ranks, the same on each. Waits unless they have arrived."""
        if self._result is None:
            self._work.wait()
            if self._copied is not None:
                self._copied.synchronize()
            self._result = self._values.tolist()
        return self._result


@dataclass(frozen=True)
class World:
    """This rank, its device, and the control group of all ranks."""

    rank: int
    size: int
    device: torch.device
    control: Any

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over the ranks, in float64, with the same result on every rank."""
        return self.begin_sum(*values).result()

    def begin_sum(self, *values: float) -> Reduction:
        """Start to sum each value over the ranks, in float64."""
        return self._begin(values, dist.ReduceOp.SUM)

    def begin_max(self, *values: float) -> Reduction:
        """Start to find the maximum of each value over the ranks, in float64."""
        return self._begin(values, dist.ReduceOp.MAX)

    def _begin(self, values: Sequence[float], op: Any) -> Reduction:
        return Reduction(torch.tensor(values, dtype=torch.float64), op, self.control)

    def gather(self, value: _Result, kind: Any) -> list[_Result]:
        """Every rank's value of a type, in order of rank, on every rank. Raises LaunchError."""
        message = encode(value, kind)
        lengths = self._gather_numbers(len(message))
        _require_short(max(lengths), _MAX_BYTES_OF_EACH)
        own = torch.zeros(max(lengths), dtype=torch.uint8)
        own[: len(message)] = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        received = [torch.empty_like(own) for _ in lengths]
        dist.all_gather(received, own, group=self.control)
        return [
            decode(padded[:length].numpy().tobytes(), kind, rank)
            for rank, (padded, length) in enumerate(zip(received, lengths, strict=True))
        ]

    def of_first(self, value: _Result, kind: Any) -> _Result:
        """The first rank's value of a type, on every rank. Raises LaunchError."""
        message = encode(value, kind) if self.is_first else b""
        length = torch.tensor(len(message))
        dist.broadcast(length, src=0, group=self.control)
        _require_short(int(length), _MAX_BYTES_OF_FIRST)
        content = torch.empty(int(length), dtype=torch.uint8)
        if self.is_first:
            content = torch.frombuffer(bytearray(message), dtype=torch.uint8)
        dist.broadcast(content, src=0, group=self.control)
        return value if self.is_first else decode(content.numpy().tobytes(), kind, 0)

    def _gather_numbers(self, number: int) -> list[int]:
        """Every rank's number, in order of rank, on every rank."""
        received = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(received, torch.tensor([number]), group=self.control)
        return [int(one) for one in received]

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def run_collectively(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call a function on every rank; if it fails on any, stop all with one message.

        The lowest rank that failed prints its error, and every rank exits with its code.
        """
        result, error = attempt(function, *arguments)
        self.stop_if_any(error)
        return result  # type: ignore[return-value]

    def stop_if_any(self, error: MegabackError | None) -> None:
        """End every rank when any has an error: one message, one exit code."""
        # The smallest number is the code of the lowest rank that has an error.
        own = self.rank * _CODES + error.exit_code if error else _NO_ERROR
        numbers = torch.tensor([own])
        dist.all_reduce(numbers, dist.ReduceOp.MIN, self.control)
        if int(numbers) == _NO_ERROR:
            return
        first, code = divmod(int(numbers), _CODES)
        speaks = self.rank == first and error is not None
        if speaks and error is not None:
            report(error)
        self.barrier()  # the message is printed before the launcher sees any rank exit
        raise CollectiveExit(code, error if speaks else None)


def attempt(
    function: Callable[..., _Result], *arguments: Any
) -> tuple[_Result | None, MegabackError | None]:
    """Call a function; returns its result, or the error to agree on with the other ranks."""
    try:
        return function(*arguments), None
    except MegabackError as error:
        return None, error
    except OSError as error:
        return None, system_error(error)


def without_operators() -> None:
    """Mark all of DeepSpeed's operators, of which training uses none, as incompatible.

    Otherwise it tries each at startup. On a CPU it then compiles one that is for inference, 45 s.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__ = {}


def start_world(device_name: str, timeout_s: float) -> World:
    """Join the other ranks. Raises BackendError or LaunchError."""
    name_rank()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = choose_device(device_name, local_rank)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    without_operators()
    if device.type == "cuda":
        torch.cuda.set_device(device)
        os.environ["LOCAL_RANK"] = str(device.index)  # DeepSpeed's index of the device
        _allow_device_names()
    backend = "nccl" if device.type == "cuda" else "gloo"
    raise_file_limit()  # gloo opens a socket per peer and group, the store one per rank
    meet(backend, timeout_s)
    timeout = timedelta(seconds=timeout_s)
    # It uses the existing process group.
    deepspeed.init_distributed(
        dist_backend=backend, auto_mpi_discovery=False, verbose=False, timeout=timeout
    )
    control = dist.new_group(backend="gloo", timeout=timeout, group_desc="control messages")
    world = World(dist.get_rank(), dist.get_world_size(), device, control)
    if world.size > 1:
        show_rank(world.rank)
    _LOG.debug("%d ranks, this one on %s of %s", world.size, device, node_name())
    return world


def _require_short(num_bytes: int, max_bytes: int) -> None:
    """Raises LaunchError for an oversized message, before memory is allocated for it."""
    if not 0 <= num_bytes <= max_bytes:
        raise LaunchError(
            f"a rank announces a message of {num_bytes:,} bytes, above the limit of "
            f"{max_bytes:,}; install the same version on all nodes, and make sure that only ranks "
            "can reach their ports"
        )


@contextmanager
def only_first_reports() -> Iterator[None]:
    """Report errors on the first rank only, before the ranks are connected: all of them have them.

    A LaunchError is reported by every rank, since it may concern only that rank.
    """
    try:
        yield
    except MegabackError as error:
        if (
            isinstance(error, LaunchError)
            or os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0")) == "0"
        ):
            raise
        raise SystemExit(error.exit_code) from None


def is_collective_error(error: Exception) -> bool:
    """Whether an error means that another rank is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("gloo/", "NCCL", "Connection closed by peer")
    )


def end_rank(code: int = 0) -> NoReturn:
    """End this process, as the other ranks do, with everything reported and saved.

    gloo's threads survive their groups as long as these are referenced. A thread that runs during
    the interpreter's teardown can abort the process, and a finished run would count as failed. So
    exit handlers run, and the teardown is skipped.
    """
    # NCCL's destruction would wait for a collective that never ends.
    if dist.is_initialized() and (code == 0 or dist.get_backend() == "gloo"):
        dist.destroy_process_group()
    leave(code)


def choose_device(name: str, local_rank: int) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise BackendError(
            "hardware.device is cuda, but torch sees no CUDA device; "
            "install a CUDA build of torch, or set hardware.device=cpu"
        )
    if name == "auto" and not has_cuda and count_devices() and count_device_files():
        if local_rank:
            raise SystemExit(LaunchError.exit_code)  # one rank per node reports it
        raise LaunchError(
            f"node {node_name()} has GPUs, but torch sees none; run `megaback doctor` there, or "
            "set hardware.device=cpu to train without them"
        )
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    num_devices = torch.cuda.device_count()
    if local_rank < num_devices:
        return torch.device("cuda", local_rank)
    # With srun --gpus-per-task each task sees its own device only. Preflight finds a shared one.
    if num_devices == 1 and "SLURM_STEP_NUM_TASKS" in os.environ:
        return torch.device("cuda", 0)
    raise LaunchError(
        f"local rank {local_rank} has no device: this machine has {num_devices}; start one rank "
        "per device"
    )


def _allow_device_names() -> None:
    """Accept UUIDs and MIG names in CUDA_VISIBLE_DEVICES, which DeepSpeed takes for NVML's indices.

    Without NVML it computes a device's free memory from PyTorch's allocations.
    """
    from deepspeed.accelerator import cuda_accelerator

    names = names_in(os.environ.get("CUDA_VISIBLE_DEVICES", ""))
    if not all(name.isdecimal() for name in names):
        cuda_accelerator.pynvml = None
