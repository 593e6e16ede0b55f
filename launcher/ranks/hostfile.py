"""Ranks on the hosts of a hostfile in the format of DeepSpeed: lines of `NAME slots=N`.

Each host is reached by one ssh, whose remote command contains only the quoted paths of this folder
and this Python: the ranks' command, environment and signals go to `host_ranks` there over stdin.
When this process or the connection ends, so does stdin, and the ranks save and end.
"""

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from random import SystemRandom

from data_pipeline.common.checked_json import briefly
from data_pipeline.common.import_path import module_command
from data_pipeline.common.number_ranges import SLOTS
from data_pipeline.errors import LaunchError
from launcher.ranks.local import (
    GRACE_S,
    Running,
    rank_environment,
    rank_names,
    start_rank,
    wait_for_ranks,
)
from megaback.environment import HOST_VARIABLE

SSH_VARIABLE = "MEGABACK_SSH"
"""The ssh command with its options, if not `ssh`."""
_EXIT_TIMEOUT_S = 10.0
_LINE = re.compile(r"(\S+)\s+slots=([0-9]{1,9})")
_MAX_BYTES = 1 << 20
_MAX_RANKS = 1 << 16
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.:@-]*")
_LOCAL_NAMES = {"localhost", "127.0.0.1", "::1"}
_PASSED_ON = (
    *("CUDA_", "DS_", "FI_", "GLOO_", "MEGABACK_", "NCCL_", "OMP_", "PYTHON", "PYTORCH_"),
    *(
        "TORCH",
        "TRITON_",
        "UCX_",
        "AWS_",
        "AZURE_",
        "FSSPEC_",
        "GOOGLE_",
        "HF_",
        "NETRC",
        "HUGGING_FACE_",
        "WANDB_",
        "LD_LIBRARY_PATH",
    ),
    *("http_proxy", "https_proxy", "no_proxy", "HTTP_PROXY", "HTTPS_PROXY", "NO_PROXY"),
)
"""Prefixes of the variables that are passed to ranks on other hosts."""
_OF_ONE_HOST = {"CUDA_VISIBLE_DEVICES"}


@dataclass(frozen=True)
class Host:
    """A line of a hostfile."""

    name: str
    slots: int

    @property
    def is_local(self) -> bool:
        """Whether it is this machine."""
        own = socket.gethostname()
        return self.name in {*_LOCAL_NAMES, own, own.partition(".")[0]}


def read_hostfile(path: Path) -> list[Host]:
    """The hosts of a hostfile, in its order. Raises LaunchError with the line."""
    try:
        with path.open("rb") as file:  # it may be a pipe
            data = file.read(_MAX_BYTES + 1)
        lines = data.decode().splitlines()
    except OSError as error:
        raise LaunchError(
            f"cannot read the hostfile {path}: {error.strerror}; give a file with lines like "
            "`node1 slots=8`"
        ) from None
    except UnicodeDecodeError:
        raise LaunchError(
            f"the hostfile {path} is not text; write lines like `node1 slots=8`"
        ) from None
    if len(data) > _MAX_BYTES:
        raise LaunchError(f"the hostfile {path} has more than {_MAX_BYTES:,} bytes")
    hosts: list[Host] = []
    names: set[str] = set()
    for number, line in enumerate(lines, 1):
        line = line.partition("#")[0].strip()
        if not line:
            continue
        where = f"{path}, line {number}"
        found = _LINE.fullmatch(line)
        if found is None or not _NAME.fullmatch(found[1]) or SLOTS.problem(int(found[2])):
            raise LaunchError(
                f"{where}: {briefly(line)} is not like `node1 slots=8` (1 to {SLOTS.max} slots)"
            )
        host = Host(found[1], int(found[2]))
        if host.name in names:
            raise LaunchError(f"{where}: {host.name} is listed twice; list it once, with all slots")
        if host.is_local and any(other.is_local for other in hosts):
            raise LaunchError(
                f"{where}: {host.name} is this machine, as is an earlier line; list it once, with "
                "all slots"
            )
        hosts.append(host)
        names.add(host.name)
    if sum(host.slots for host in hosts) > _MAX_RANKS:
        raise LaunchError(f"the hostfile {path} has more than {_MAX_RANKS:,} slots in all")
    if not hosts:
        raise LaunchError(f"the hostfile {path} names no host; a line is like `node1 slots=8`")
    return hosts


def host_rank_names(hosts: Sequence[Host]) -> list[list[dict[str, str]]]:
    """Variables of each host's ranks: rank, local rank, world size and rendezvous address.

    MASTER_ADDR and MASTER_PORT of this environment take precedence. Raises LaunchError if the name
    of the first host cannot be resolved.
    """
    (meeting,) = rank_names(1)
    address, port = meeting["MASTER_ADDR"], meeting["MASTER_PORT"]
    if not all(host.is_local for host in hosts):
        first = hosts[0]
        address = socket.gethostname() if first.is_local else first.name.rpartition("@")[2]
        if not first.is_local:  # its free ports are unknown here
            port = str(SystemRandom().randrange(10_000, 30_000))
    address = os.environ.get("MASTER_ADDR", address)
    try:
        socket.getaddrinfo(address, None)
    except (OSError, UnicodeError):  # the latter for labels that are empty or too long
        raise LaunchError(
            f"the name {address} of the first host is not known to this network; "
            "set MASTER_ADDR to its address"
        ) from None
    common = {
        "WORLD_SIZE": str(sum(host.slots for host in hosts)),
        "MASTER_ADDR": address,
        "MASTER_PORT": os.environ.get("MASTER_PORT", port),
    }
    names = []
    rank = 0
    for host in hosts:
        here = common | {"LOCAL_SIZE": str(host.slots), HOST_VARIABLE: host.name}
        names.append(
            [
                here | {"RANK": str(rank + local_rank), "LOCAL_RANK": str(local_rank)}
                for local_rank in range(host.slots)
            ]
        )
        rank += host.slots
    return names


def run_on_hosts(
    hosts: Sequence[Host], command: Sequence[str], grace_s: float = GRACE_S
) -> tuple[list[int], list[str], list[int]]:
    """Run ranks on all hosts to their end, passing signals on to every one.

    `grace_s` is as for `run_ranks`. Returns the exit codes in the order in which they ended (one
    per rank here, one per other host), the host of each, and the received signals. Raises
    LaunchError.
    """
    names = host_rank_names(hosts)
    ssh = [] if all(host.is_local for host in hosts) else ssh_command()
    places: list[str] = []

    def start_all() -> Iterator[Running]:
        for host, its_names in zip(hosts, names, strict=True):
            if not host.is_local:
                places.append(host.name)
                yield RemoteRanks(ssh, host, command, its_names, grace_s)
                continue
            environment = rank_environment(host.slots)
            for one in its_names:
                places.append(host.name)
                yield start_rank(command, {**environment, **one})

    ended, signals = wait_for_ranks(start_all(), grace_s)
    return [code for _, code in ended], [places[number] for number, _ in ended], signals


class RemoteRanks:
    """The ranks of another host, behind one ssh."""

    def __init__(
        self,
        ssh: Sequence[str],
        host: Host,
        command: Sequence[str],
        names: Sequence[Mapping[str, str]],
        grace_s: float,
    ) -> None:
        order = {
            "command": list(command),
            "names": [dict(one) for one in names],
            "grace_s": grace_s,
            "environment": passed_environment(os.environ),
        }
        # ssh joins its arguments and passes them to a shell.
        ranks = shlex.join(module_command("launcher.ranks.host_ranks"))
        self._process = subprocess.Popen(
            [*ssh, "--", host.name, f"cd {shlex.quote(str(Path.cwd()))} && exec {ranks}"],
            stdin=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # a terminal's Ctrl-C is passed on by this process
        )
        self._kill_deadline_s: float | None = None
        self._send_line(json.dumps(order))

    def poll(self) -> int | None:
        """The exit code of `host_ranks` for its ranks, or that of ssh."""
        code = self._process.poll()
        if code is not None and 128 < code < 128 + 65:
            return 128 - code
        return code

    def send_signal(self, number: int, /) -> None:
        """Send a signal to each rank there."""
        self._send_line(str(int(number)))

    def kill(self) -> None:
        """Kill the ranks; after a timeout, close the connection."""
        if self._kill_deadline_s is None:
            self._kill_deadline_s = time.monotonic() + _EXIT_TIMEOUT_S
            self._send_line(str(int(signal.SIGKILL)))
        elif time.monotonic() > self._kill_deadline_s:
            self._process.kill()

    def _send_line(self, line: str) -> None:
        assert self._process.stdin is not None
        left = memoryview(line.encode() + b"\n")
        with suppress(OSError):  # it has ended: see its exit code
            while left:
                left = left[self._process.stdin.write(left) :]


def ssh_command() -> list[str]:
    """The ssh command with options: no prompts, and a lost host is noticed within a minute.

    Raises LaunchError if ssh is not installed.
    """
    text = os.environ.get(SSH_VARIABLE, "ssh")
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise LaunchError(f"{SSH_VARIABLE}={text} is not a command: {error}") from None
    if not words or shutil.which(words[0]) is None:
        raise LaunchError(
            f"the command {text!r}, which connects to other hosts, is not installed; install "
            f"openssh-client, or name another command in {SSH_VARIABLE}"
        )
    quiet = ("BatchMode=yes", "ConnectTimeout=20", "ServerAliveInterval=15")
    return [*words, *(word for option in quiet for word in ("-o", option))]


def passed_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """The variables that are passed to ranks on other hosts."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith(_PASSED_ON) and name not in _OF_ONE_HOST
    }
