"""Ranks and what they agree on. The one place that touches the environment of a rank.

Ranks are named by RANK, WORLD_SIZE and LOCAL_RANK (the deepspeed command, torchrun), by SLURM_*
(srun with one task a device), or there is one. Control messages go over gloo on the CPU, beside
whatever moves the gradients, so that agreeing never waits for a GPU.
"""

import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist

from data_pipeline.command import report, system_error
from data_pipeline.errors import BackendError, LaunchError, MegabackError
from data_pipeline.interrupts import leave
from megaback.device_files import count_device_files, count_devices
from megaback.slurm_nodes import first_node
from megaback.stopping import HOST_VARIABLE

_Result = TypeVar("_Result")
_NAME_WAIT_S = 1.0
"""Between tries to look up a name: a job's many ranks ask at once."""


class AgreedExit(SystemExit):
    """All ranks end together; the one that spoke has the error."""

    def __init__(self, code: int | None, error: MegabackError | None) -> None:
        super().__init__(code)
        self.error = error


@dataclass(frozen=True)
class World:
    """This process among all."""

    rank: int
    size: int
    device: torch.device
    control: Any

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Sum each value over the ranks, in float64, the same on every rank."""
        totals = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(totals, group=self.control)
        summed: list[float] = totals.tolist()
        return summed

    def slots(self, value: float) -> list[float]:
        """A value a rank, zeros but for this rank's: their `sum` are the values of all ranks."""
        return [value if rank == self.rank else 0.0 for rank in range(self.size)]

    def gather(self, value: _Result) -> list[_Result]:
        """Every rank's value, in order of rank, on every rank."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def barrier(self) -> None:
        dist.barrier(group=self.control)

    def together(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        """Call a function on every rank; if it fails on any, stop all with one message.

        The lowest rank that failed prints its sentence, and every rank exits with its code.
        """
        result, error = attempt(function, *arguments)
        self.stop_if_any(error)
        return result  # type: ignore[return-value]

    def stop_if_any(self, error: MegabackError | None) -> None:
        """End every rank when any has an error: one message, one exit code."""
        codes = self.gather(error.exit_code if error else None)
        failed = [rank for rank, code in enumerate(codes) if code is not None]
        if not failed:
            return
        speaks = self.rank == failed[0] and error is not None
        if speaks and error is not None:
            report(error)
        self.barrier()  # nobody exits, and is noticed by the launcher, before the message is out
        raise AgreedExit(codes[failed[0]], error if speaks else None)


def attempt(
    function: Callable[..., _Result], *arguments: Any
) -> tuple[_Result | None, MegabackError | None]:
    """Call a function; its result, or the error that the ranks have to agree on."""
    try:
        return function(*arguments), None
    except MegabackError as error:
        return None, error
    except OSError as error:
        return None, system_error(error)


def start_world(device_name: str, timeout_s: float) -> World:
    """Join the other ranks. Raises BackendError or LaunchError."""
    _name_rank_from_slurm()
    _name_lonely_rank()
    local_rank = int(os.environ["LOCAL_RANK"])
    device = _choose_device(device_name, local_rank)
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    import deepspeed

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    # On a CPU DeepSpeed compiles this operator at start-up, 45 s, for inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if device.type == "cuda":
        torch.cuda.set_device(device)
    _require_first_node(os.environ["MASTER_ADDR"])
    deepspeed.init_distributed(
        dist_backend="nccl" if device.type == "cuda" else "gloo",
        auto_mpi_discovery=False,
        verbose=False,
        timeout=timedelta(seconds=timeout_s),
    )
    control = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
    return World(dist.get_rank(), dist.get_world_size(), device, control)


def _require_first_node(address: str) -> None:
    """Raises LaunchError for a name that nobody knows here, which torch asks for until it times
    out."""
    for tries_left in (2, 1, 0):
        try:
            socket.getaddrinfo(address, None)
        except OSError as error:
            if not tries_left:
                raise LaunchError(
                    f"the first node's name, {address}, is not known on {node_name()} "
                    f"({error.strerror}); set MASTER_ADDR to its address"
                ) from None
            time.sleep(_NAME_WAIT_S)
        else:
            return


@contextmanager
def one_voice() -> Iterator[None]:
    """Before the ranks can talk: of an error that all of them meet, let the first one speak.

    A LaunchError is one rank's own.
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
    """Whether this is what a rank sees when another one is gone."""
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(
        sign in str(error) for sign in ("gloo/", "NCCL", "Connection closed by peer")
    )


def node_name() -> str:
    """This node as its user knows it: by the hostfile, by Slurm, or by itself."""
    environment = os.environ
    return (
        environment.get(HOST_VARIABLE) or environment.get("SLURMD_NODENAME") or socket.gethostname()
    )


def end_rank(code: int = 0) -> NoReturn:
    """End this process, of which everything is said and saved; the other ranks do so too.

    Threads of gloo outlive their groups for as long as anything refers to these. One of them that
    meets the interpreter while this is taken down aborts the process, and a run that has trained to
    its end would count as failed. So handlers of the exit run, and the rest is left to the kernel.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    leave(code)


def _choose_device(name: str, local_rank: int) -> torch.device:
    has_cuda = torch.cuda.is_available()
    if name == "cuda" and not has_cuda:
        raise BackendError(
            "hardware.device is cuda, but torch sees no CUDA device; "
            "install a CUDA build of torch, or set hardware.device=cpu"
        )
    if name == "auto" and not has_cuda and count_devices() and count_device_files():
        if local_rank:
            raise SystemExit(LaunchError.exit_code)  # one rank of the node says it
        raise LaunchError(
            f"node {node_name()} has GPUs, but torch sees none; `megaback doctor` says more there, "
            "and hardware.device=cpu does without them"
        )
    if name == "cpu" or not has_cuda:
        return torch.device("cpu")
    if local_rank >= torch.cuda.device_count():
        raise LaunchError(
            f"local rank {local_rank} has no device: this machine shows "
            f"{torch.cuda.device_count()}; start one rank a device"
        )
    return torch.device("cuda", local_rank)


def _name_rank_from_slurm() -> None:
    """Inside an srun step, translate Slurm's names. A batch script itself is not a rank."""
    environment = os.environ
    if "RANK" in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment["LOCAL_SIZE"] = str(
        _tasks_on_node(environment["SLURM_STEP_TASKS_PER_NODE"], int(environment["SLURM_NODEID"]))
    )
    if "MASTER_ADDR" not in environment:
        environment["MASTER_ADDR"] = first_node(environment.get("SLURM_STEP_NODELIST", ""))
    if "MASTER_PORT" not in environment:
        # Below the ports that Linux hands out by itself; two steps of a job differ too.
        job, step = int(environment["SLURM_JOB_ID"]), int(environment["SLURM_STEP_ID"])
        environment["MASTER_PORT"] = str(10_000 + (job + 7_919 * step) % 20_000)


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Read Slurm's notation: `2(x3),1` is 2 tasks on each of nodes 0 to 2 and 1 on node 3."""
    counts: list[int] = []
    for entry in tasks_per_node.split(","):
        count, _, repeat = entry.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[node]


def _name_lonely_rank() -> None:
    if "RANK" in os.environ:
        return
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ |= {
        "RANK": "0",
        "WORLD_SIZE": "1",
        "LOCAL_RANK": "0",
        "LOCAL_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
