"""Start ranks on this machine, one per device, and wait for them.

Signals to this process are passed on to all ranks, which save together; when a rank dies, the
others have time to report it. The command is in `train`, other machines in `hostfile`.
(`deepspeed megaback/train.py CONFIG` starts the same ranks; decision 14 has the reasons for this.)
"""

import math
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any, Protocol

from data_pipeline import errors
from data_pipeline.errors import (
    LaunchError,
    MegabackError,
    PreemptedError,
    RankLostError,
    SupersededError,
    UserInterruptError,
)
from megaback.config import Config
from megaback.distributed.visible_devices import count_devices
from megaback.environment import LAUNCHER_VARIABLE

CONNECTION_LOST = 255
"""ssh's own exit code."""
GRACE_S = 10.0
"""Time for the other ranks to end after one has reported an error."""
_SECOND_GRACE_S = 2.0
"""Grace period after a second Ctrl-C."""
_SAME_REQUEST_S = 1.0
_LOST = (-signal.SIGABRT, -signal.SIGALRM, -signal.SIGKILL)
"""Codes of a lost rank: torch and CUDA abort a process, the watchdog's alarm ends one that is
blocked, the kernel kills it."""
_POLL_S = 0.05


class Running(Protocol):
    """A rank, or all ranks of another host."""

    def poll(self) -> int | None:
        """The exit code (negative: the signal that killed it), or None while it runs."""

    def send_signal(self, number: int, /) -> None:
        """Pass a signal on, if it still runs."""

    def kill(self) -> None:
        """Kill it."""


def count_ranks(config: Config) -> int:
    """The number of ranks for this machine."""
    hardware = config.hardware
    return hardware.processes or (hardware.device != "cpu" and count_devices()) or 1


def loss_grace_s(config: Config) -> float:
    """Time for the other ranks to report a lost one, which takes them a few heartbeats."""
    return GRACE_S + 4 * config.hardware.heartbeat_s


def rank_environment(processes: int) -> dict[str, str]:
    """The environment of the ranks: this one, with fewer warnings and the cores divided."""
    environment = dict(os.environ)
    cores = len(os.sched_getaffinity(0))
    environment.setdefault("OMP_NUM_THREADS", str(max(cores // processes, 1)))
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    return environment


def rank_names(processes: int) -> list[dict[str, str]]:
    """Variables of each rank: rank, local rank, world size and rendezvous address."""
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run_ranks(
    command: Sequence[str],
    environment: Mapping[str, str],
    processes: int,
    grace_s: float = GRACE_S,
) -> tuple[list[int], list[int]]:
    """Run all ranks to their end, passing signals on to every one.

    `grace_s` is the time for the others to report a rank that ended without a reason. Returns their
    exit codes (negative: the signal that killed it), in the order in which they ended, and the
    received signals.
    """

    def start_all() -> Iterator[Running]:
        for names in rank_names(processes):
            yield start_rank(command, {**environment, **names})

    ended, signals = wait_for_ranks(start_all(), grace_s)
    return [code for _, code in ended], signals


def start_rank(
    command: Sequence[str],
    environment: Mapping[str, str],
    output: int | None = None,
    errors_output: int | None = None,
) -> "subprocess.Popen[bytes]":
    """Start a rank that stops if this process ends; it prints to the given descriptors."""
    variables = {**environment, LAUNCHER_VARIABLE: str(os.getpid())}
    # The rank unblocks Ctrl-C once it has a handler (`megaback.faults.stop_request`).
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        # A session of its own: a terminal's Ctrl-C is passed on, once, by this process.
        return subprocess.Popen(
            command, env=variables, stdout=output, stderr=errors_output, start_new_session=True
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def wait_for_ranks(
    starting: Iterable[Running], grace_s: float
) -> tuple[list[tuple[int, int]], list[int]]:
    """Start ranks one after another, wait for all, and pass on every signal meanwhile.

    Returns the index and exit code of each, in the order in which they ended, and the received
    signals.
    """
    ranks: list[Running] = []
    with _passing_signals(ranks) as received:
        for rank in starting:
            ranks.append(rank)
        for number, _ in list(received):  # for ranks that had not started yet
            for rank in ranks:
                rank.send_signal(number)
        return _wait(ranks, received, grace_s), [number for number, _ in received]


def _wait(
    ranks: Sequence[Running], received: Sequence[tuple[int, float]], grace_s: float
) -> list[tuple[int, int]]:
    ended: list[tuple[int, int]] = []
    running = dict(enumerate(ranks))
    give_up = None
    while running:
        for number, process in list(running.items()):
            code = process.poll()
            if code is not None:
                del running[number]
                ended.append((number, code))
                if code and give_up is None:
                    give_up = time.monotonic() + (GRACE_S if code in reasons() else grace_s)
        interrupts_s = [moment for number, moment in received if number == signal.SIGINT]
        if interrupts_s and interrupts_s[-1] - interrupts_s[0] > _SAME_REQUEST_S:
            give_up = min(give_up or math.inf, interrupts_s[-1] + _SECOND_GRACE_S)
        if give_up is not None and time.monotonic() > give_up:
            for process in running.values():
                process.kill()
        time.sleep(_POLL_S)
    return ended


@contextmanager
def _passing_signals(ranks: list[Running]) -> Iterator[list[tuple[int, float]]]:
    """Pass signals on to the ranks; yields the received ones with their times.

    SIGHUP, the end of the terminal, is passed on as SIGTERM: the ranks have no terminal.
    """
    received: list[tuple[int, float]] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        number = signal.SIGTERM if number == signal.SIGHUP else number
        received.append((number, time.monotonic()))
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # ignored under nohup
        numbers.append(signal.SIGHUP)
    previous = {number: signal.signal(number, pass_on) for number in numbers}
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def reasons() -> set[int]:
    """Exit codes of ranks that have reported why they end."""
    family = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {kind.exit_code for kind in family if issubclass(kind, MegabackError)}
    return codes - {MegabackError.exit_code}


def verdict(
    codes: Sequence[int],
    signals: Sequence[int],
    ending: dict[str, Any] | None,
    hosts: Sequence[str] = (),
    *,
    has_trained: bool = False,
    last_seen: str = "",
) -> int:
    """The exit code of the run. Raises an error if the ranks ended without a reason.

    `ending` is the record of the first rank with a reason; the others may have ended because it
    did. `signals` were passed on to the ranks. `hosts` are the hosts of the codes, if not all are
    of this machine. `has_trained`: the ranks have taken a step in this start. `last_seen`: phases
    of ranks that have died.
    """
    if SupersededError.exit_code in codes:
        return SupersededError.exit_code
    if ending is not None and ending.get("code") in codes:
        return int(ending["code"])
    with_reason = [code for code in codes if code in reasons() - {UserInterruptError.exit_code}]
    if with_reason:
        return with_reason[0]
    failed = [number for number, code in enumerate(codes) if code]
    if not failed:
        return 0
    if signals:
        raise _unsaved(set(signals), codes[failed[0]], has_trained)
    code = codes[failed[0]]
    where = f" on {hosts[failed[0]]}" if hosts else ""
    if hosts and code == CONNECTION_LOST:
        raise LaunchError(
            f"ssh could not connect to {hosts[failed[0]]}, or lost the connection (see its message "
            "above); check that `ssh HOST true` works without a password, and run the same command "
            "again"
        )
    advice = "see their output above"
    if code == -signal.SIGKILL:
        advice = "often out of memory: see dmesg"
    if hosts and code > 0:
        advice = (
            "see the messages above; this folder and this Python are needed at the same paths there"
        )
    kind = RankLostError if code in _LOST else LaunchError
    phase = f"; {last_seen}" if last_seen else ""
    raise kind(
        f"the ranks{where} {_how(code)} without reporting a reason ({advice}){phase}; "
        "run the same command again to resume"
    )


def _unsaved(signals: set[int], code: int, has_trained: bool) -> MegabackError:
    """The error of ranks that were asked to stop, and ended without saving."""
    if not has_trained and signals == {signal.SIGINT}:
        return UserInterruptError("interrupted before the first step; there was nothing to save")
    if not has_trained:
        return PreemptedError("asked to stop while starting; run the same command to resume")
    resume = "run the same command to resume from the newest checkpoint"
    if signal.SIGINT in signals:
        return UserInterruptError(f"interrupted before the ranks had saved; {resume}")
    return LaunchError(
        f"the ranks were asked to stop, but {_how(code)} before they saved; {resume}"
    )


def _how(code: int) -> str:
    names = {number.value: number.name for number in signal.Signals}
    return f"were killed by {names.get(-code, code)}" if code < 0 else f"ended with code {code}"
