"""Rendezvous: the rank of this process from the environment, and the store where ranks connect.

Ranks are identified by RANK, WORLD_SIZE and LOCAL_RANK (`megaback train`, the deepspeed command,
torchrun) or by SLURM_* (srun with one task per device); without either there is one rank. They
connect to a store that the first rank serves. It has no authentication, so on one machine it
listens on loopback only.
"""

import errno
import hashlib
import ipaddress
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from data_pipeline.common.loopback import is_loopback
from data_pipeline.errors import LaunchError
from megaback.distributed.slurm_nodes import first_node
from megaback.environment import HOST_VARIABLE

_LOOPBACK = "lo"
"""Name of the loopback interface on Linux."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_NAME_WAIT_S = 1.0
"""Delay between name lookups, in seconds: all ranks of a job look up at once."""


def name_rank() -> None:
    """Set the environment variables of this rank and of the first one's address, if missing.

    Raises LaunchError.
    """
    _name_rank_from_slurm()
    _set_single_process_environment()


def node_name() -> str:
    """Name of this node in the hostfile, else in Slurm, else its hostname."""
    environment = os.environ
    return (
        environment.get(HOST_VARIABLE) or environment.get("SLURMD_NODENAME") or socket.gethostname()
    )


def ranks_per_node() -> int:
    """Number of ranks on this node, as what started them says. Raises LaunchError."""
    environment = os.environ
    size = environment.get("LOCAL_SIZE") or environment.get("LOCAL_WORLD_SIZE")  # torchrun's
    if size is None or not size.isdecimal() or not int(size):
        found = "" if size is None else f" (LOCAL_SIZE is {size!r})"
        raise LaunchError(
            f"rank {environment['RANK']} does not know how many ranks {node_name()} has{found}; "
            "set LOCAL_SIZE, or start the ranks by `megaback train`, srun or torchrun"
        )
    return int(size)


def meet(backend: str, timeout_s: float) -> None:
    """Join the other ranks in torch's default group. Raises LaunchError."""
    environment, timeout = os.environ, timedelta(seconds=timeout_s)
    address = environment["MASTER_ADDR"]
    require_known(address)
    # torch's default aborts the process (SIGABRT) after an error of NCCL, before the watchdog can
    # report which rank is lost. 2 aborts only the kernels, and training would continue with
    # corrupted gradients until the next collective; with 0 they block until the watchdog exits.
    environment.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
    if is_loopback(address):  # all ranks are on this machine
        for name in _INTERFACES:
            environment.setdefault(name, _LOOPBACK)
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # torchrun serves the store
        dist.init_process_group(backend, timeout=timeout)
        return
    rank, size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    port = int(environment["MASTER_PORT"])
    listening = listen(address, port).detach() if rank == 0 else None
    try:
        store = dist.TCPStore(  # type: ignore[attr-defined]
            address, port, size, is_master=rank == 0, timeout=timeout, master_listen_fd=listening
        )
    except dist.DistError:
        raise LaunchError(
            f"rank {rank} on {node_name()} could not connect to the other ranks at {address}, port "
            f"{port}, within {timeout_s:g} s; check their output, and that all nodes can reach "
            "that address"
        ) from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def listen(address: str, port: int) -> socket.socket:
    """Listening socket for the store: at a numeric address, or, for a name, on all interfaces.

    Other nodes may resolve a name to another address. Raises LaunchError when the port is in use.
    """
    try:
        host = "127.0.0.1" if address == "localhost" else str(ipaddress.ip_address(address))
    except ValueError:
        host = ""
    try:
        return _listen(host, port)
    except OSError as error:
        # Behind NAT, other nodes use an address that this node does not have.
        if error.errno == errno.EADDRNOTAVAIL and not is_loopback(address):
            return listen("", port)
        raise LaunchError(
            f"rank 0 cannot listen on port {port} of {node_name()}: {error.strerror}; run the "
            "same command again, or set MASTER_PORT to a free port"
        ) from None


def _listen(host: str, port: int) -> socket.socket:
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def require_known(address: str) -> None:
    """Raises LaunchError for a name that cannot be resolved, which torch retries until it times
    out."""
    for tries_left in (2, 1, 0):
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            if not tries_left or isinstance(error, UnicodeError):
                raise LaunchError(
                    f"the first node's name, {address}, cannot be resolved on {node_name()} "
                    f"({getattr(error, 'strerror', None) or error}); set MASTER_ADDR to its address"
                ) from None
            time.sleep(_NAME_WAIT_S)
        else:
            return


def _name_rank_from_slurm() -> None:
    """Within an srun step, set the variables from Slurm's. A batch script itself is not a rank."""
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
        is_one_node = environment["LOCAL_SIZE"] == environment["WORLD_SIZE"]
        environment["MASTER_ADDR"] = (
            "127.0.0.1" if is_one_node else first_node(environment.get("SLURM_STEP_NODELIST", ""))
        )
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(_port_of_step())


def _port_of_step() -> int:
    """A port that all tasks of a step derive alike, below Linux's ephemeral ports.

    Two steps of a job differ. srun's own ports are random, and known only to its tasks and on the
    node where it runs, so that the port does not follow from the job's id.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_LAUNCHER_PORT", "SLURM_SRUN_COMM_PORT")
    known = "/".join(os.environ.get(name, "") for name in names)
    return 10_000 + int.from_bytes(hashlib.sha256(known.encode()).digest()[:8], "big") % 20_000


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Tasks on a node, in Slurm's notation: `2(x3),1` is 2 on each of nodes 0 to 2, 1 on node 3."""
    counts: list[int] = []
    for entry in tasks_per_node.split(","):
        count, _, repeat = entry.partition("(x")
        counts += [int(count)] * int(repeat.rstrip(")") or 1)
    return counts[node]


def _set_single_process_environment() -> None:
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
