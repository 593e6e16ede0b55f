"""Which rank this process is, and where the ranks meet: the environment, and torch's store.

Ranks are named by RANK, WORLD_SIZE and LOCAL_RANK (`megaback train`, the deepspeed command,
torchrun), by SLURM_* (srun with one task a device), or there is one. They meet at a store that the
first rank serves. It asks for no password, so on one machine it listens on loopback only.
"""

import errno
import hashlib
import ipaddress
import os
import socket
import time
from datetime import timedelta

import torch.distributed as dist

from data_pipeline.errors import LaunchError
from megaback.distributed.slurm_nodes import first_node
from megaback.environment import HOST_VARIABLE

_LOOPBACK = "lo"
"""Linux's name of the interface."""
_INTERFACES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
_NAME_WAIT_S = 1.0
"""Between tries to look up a name: a job's many ranks ask at once."""


def name_rank() -> None:
    """Say in the environment which rank this is, and where the first one is, unless it is there.

    Raises LaunchError.
    """
    _name_rank_from_slurm()
    _set_single_process_environment()


def node_name() -> str:
    """This node as its user knows it: by the hostfile, by Slurm, or by itself."""
    environment = os.environ
    return (
        environment.get(HOST_VARIABLE) or environment.get("SLURMD_NODENAME") or socket.gethostname()
    )


def meet(backend: str, timeout_s: float) -> None:
    """Join the other ranks in torch's default group. Raises LaunchError."""
    environment, timeout = os.environ, timedelta(seconds=timeout_s)
    address = environment["MASTER_ADDR"]
    require_known(address)
    if is_loopback(address):  # all ranks are here, and nobody else needs to reach them
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
            f"rank {rank} on {node_name()} and the others did not meet at {address}, port {port}, "
            f"within {timeout_s:g} s; see what they printed, and that all nodes reach that address"
        ) from None
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)


def listen(address: str, port: int) -> socket.socket:
    """A socket for the store: at an address that is a number, or, for a name, at all interfaces.

    Other nodes may know a name by another address than this one does. Raises LaunchError when the
    port is taken.
    """
    try:
        host = "127.0.0.1" if address == "localhost" else str(ipaddress.ip_address(address))
    except ValueError:
        host = ""
    try:
        return _listen(host, port)
    except OSError as error:
        # Behind a translation of addresses, others reach this node by one that it does not have.
        if error.errno == errno.EADDRNOTAVAIL and not is_loopback(address):
            return listen("", port)
        raise LaunchError(
            f"the ranks cannot meet on port {port} of {node_name()}: {error.strerror}; run the "
            "same command again, or set MASTER_PORT to a port that is free there"
        ) from None


def _listen(host: str, port: int) -> socket.socket:
    if host:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def is_loopback(address: str) -> bool:
    """Whether an address means this machine wherever it is used, which a host's name does not."""
    try:
        return address == "localhost" or ipaddress.ip_address(address).is_loopback
    except ValueError:
        return False


def require_known(address: str) -> None:
    """Raises LaunchError for a name that nobody knows here, which torch asks for until it times
    out."""
    for tries_left in (2, 1, 0):
        try:
            socket.getaddrinfo(address, None)
        except (OSError, UnicodeError) as error:
            if not tries_left or isinstance(error, UnicodeError):
                raise LaunchError(
                    f"the first node's name, {address}, is not known on {node_name()} "
                    f"({getattr(error, 'strerror', None) or error}); set MASTER_ADDR to its address"
                ) from None
            time.sleep(_NAME_WAIT_S)
        else:
            return


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
        is_one_node = environment["LOCAL_SIZE"] == environment["WORLD_SIZE"]
        environment["MASTER_ADDR"] = (
            "127.0.0.1" if is_one_node else first_node(environment.get("SLURM_STEP_NODELIST", ""))
        )
    if "MASTER_PORT" not in environment:
        environment["MASTER_PORT"] = str(_port_of_step())


def _port_of_step() -> int:
    """A port that all tasks of a step come to alike, below those that Linux hands out by itself.

    Two steps of a job differ. srun's own ports, which it was given by chance, are known to its
    tasks and on the node where it runs, but not from the numbers of a job.
    """
    names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_STEP_LAUNCHER_PORT", "SLURM_SRUN_COMM_PORT")
    known = "/".join(os.environ.get(name, "") for name in names)
    return 10_000 + int.from_bytes(hashlib.sha256(known.encode()).digest()[:8], "big") % 20_000


def _tasks_on_node(tasks_per_node: str, node: int) -> int:
    """Read Slurm's notation: `2(x3),1` is 2 tasks on each of nodes 0 to 2 and 1 on node 3."""
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
