"""Ranks are started, signaled and waited for, and the launcher exits as they did."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import (
    LaunchError,
    MegabackError,
    NonFiniteError,
    PreemptedError,
    RankLostError,
    UserInterruptError,
)
from launcher.ranks import local
from launcher.ranks.local import rank_environment, rank_names, run_ranks
from megaback.environment import LAUNCHER_VARIABLE

RunRanks = Callable[..., tuple[list[int], list[int]]]
SIGNALS = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
NAMES = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT"]
LOST = 51

_PREAMBLE = """
import json, os, signal, sys, time
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
"""
_REPORT = """
fields = {"environment": dict(os.environ), "session": os.getsid(0), "pid": os.getpid()}
with open(f"rank-{rank}", "w") as file:
    json.dump(fields, file)
"""
# Records each signal; ends half a second after the first one, so that all are recorded.
_LISTEN = """
received = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
open(f"ready-{rank}", "w").close()
give_up = time.monotonic() + 60
while not received and time.monotonic() < give_up:
    time.sleep(0.01)
time.sleep(0.5)
with open(f"received-{rank}", "w") as file:
    json.dump(received, file)
sys.exit(75)
"""
_LAUNCH = """
import os, sys
from launcher.ranks.local import run_ranks
print(run_ranks([sys.executable, "-c", sys.argv[1]], dict(os.environ), int(sys.argv[2])))
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunRanks:
    """`run(script, processes, grace_s)`: ranks in `tmp_path` with `rank`, `size`, some modules."""
    monkeypatch.chdir(tmp_path)

    def run(script: str, processes: int, *grace_s: float) -> tuple[list[int], list[int]]:
        command = [sys.executable, "-c", _PREAMBLE + script]
        environment = {"PATH": os.environ["PATH"], "MINE": "a b"}
        return run_ranks(command, environment, processes, *grace_s)

    return run


def test_every_rank_has_its_rank_and_the_rendezvous_address(tmp_path: Path, run: RunRanks) -> None:
    assert run(_REPORT, 3) == ([0, 0, 0], [])

    environments = [
        json.loads((tmp_path / f"rank-{rank}").read_text())["environment"] for rank in range(3)
    ]
    (port,) = {environment["MASTER_PORT"] for environment in environments}
    for rank, environment in enumerate(environments):
        assert {name: environment[name] for name in NAMES} == {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": "3",
            "LOCAL_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }


def test_ranks_have_the_given_environment_and_their_launchers_pid(
    tmp_path: Path, run: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOT_GIVEN", "1")
    run(_REPORT, 1)

    environment = json.loads((tmp_path / "rank-0").read_text())["environment"]
    assert environment["MINE"] == "a b"
    assert environment[LAUNCHER_VARIABLE] == str(os.getpid())
    assert "NOT_GIVEN" not in environment


def test_a_terminals_signals_reach_ranks_only_through_the_launcher(
    tmp_path: Path, run: RunRanks
) -> None:
    """A terminal signals its whole session: each rank has one of its own."""
    run(_REPORT, 2)

    for rank in range(2):
        fields = json.loads((tmp_path / f"rank-{rank}").read_text())
        assert fields["session"] == fields["pid"]


def test_the_rendezvous_port_is_free() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", int(rank_names(2)[0]["MASTER_PORT"])))


def test_two_runs_on_a_machine_use_different_ports() -> None:
    assert len({rank_names(1)[0]["MASTER_PORT"] for _ in range(20)}) > 1


@pytest.mark.parametrize(("processes", "threads"), [(1, 6), (2, 3), (4, 1), (7, 1)])
def test_ranks_share_the_cores_of_their_machine(
    processes: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))

    environment = rank_environment(processes)

    assert environment["OMP_NUM_THREADS"] == str(threads)


def test_variables_of_the_user_take_precedence(monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"OMP_NUM_THREADS": "5", "PYTHONWARNINGS": "error"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)

    assert rank_environment(2).items() >= own.items()


def test_codes_are_in_the_order_in_which_ranks_ended(run: RunRanks) -> None:
    script = "time.sleep(0.4 * (size - 1 - rank)); sys.exit(rank)"

    assert run(script, 3) == ([2, 1, 0], [])


def test_the_code_of_a_killed_rank_is_the_negative_signal(run: RunRanks) -> None:
    assert run("os.kill(os.getpid(), signal.SIGKILL)", 1) == ([-signal.SIGKILL], [])


@pytest.mark.parametrize(("code", "grace_s"), [(3, 1), (LOST, 0)])
def test_a_rank_that_hangs_after_another_has_failed_is_killed_after_the_grace(
    code: int, grace_s: float, run: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Less is needed after an error that all ranks have, or that they have reported."""
    monkeypatch.setattr(local, "GRACE_S", 0)
    started = time.monotonic()
    script = f"sys.exit({code}) if rank == 1 else time.sleep(120)"

    assert run(script, 3, 1) == ([code, -signal.SIGKILL, -signal.SIGKILL], [])
    assert grace_s <= time.monotonic() - started < 60


def test_within_the_grace_period_the_others_report_why_they_end(run: RunRanks) -> None:
    script = f"time.sleep(0.5 * rank); sys.exit({LOST} if rank else 3)"

    assert run(script, 2) == ([3, LOST], [])


def test_a_finished_rank_starts_no_grace_period(run: RunRanks) -> None:
    assert run("time.sleep(rank)", 2, 0.1) == ([0, 0], [])


@pytest.mark.parametrize("number", SIGNALS, ids=lambda number: number.name)
def test_a_signal_reaches_every_rank_once(number: signal.Signals, tmp_path: Path) -> None:
    launcher = subprocess.Popen(
        [sys.executable, "-c", _LAUNCH, _PREAMBLE + _LISTEN, "3"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(local.__file__).parents[1])},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    give_up = time.monotonic() + 60
    while len(list(tmp_path.glob("ready-*"))) < 3 and time.monotonic() < give_up:
        time.sleep(0.02)
    launcher.send_signal(number)

    assert launcher.communicate(timeout=60)[0] == f"([75, 75, 75], [{int(number)}])\n"
    for rank in range(3):
        assert json.loads((tmp_path / f"received-{rank}").read_text()) == [number]


def test_a_signal_before_the_ranks_start_is_sent_to_them(
    run: RunRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    def signal_and_name(processes: int) -> list[dict[str, str]]:
        os.kill(os.getpid(), signal.SIGUSR1)
        return rank_names(processes)

    monkeypatch.setattr(local, "rank_names", signal_and_name)

    assert run("time.sleep(120)", 2) == ([-signal.SIGUSR1] * 2, [signal.SIGUSR1])


def test_signal_handlers_are_restored_at_the_end(run: RunRanks) -> None:
    before = [signal.getsignal(number) for number in SIGNALS]
    run("", 1)

    assert [signal.getsignal(number) for number in SIGNALS] == before


@pytest.mark.parametrize(
    ("codes", "ending", "expected"),
    [
        ([0, 0], None, 0),
        ([75, 75], None, 75),
        ([50, 51], None, 50),  # the first with a reason
        ([1, LOST], None, LOST),
        ([-9, LOST, LOST], None, LOST),
        ([LOST, 50], {"code": 50}, 50),  # the recorded one
        ([LOST, 1], {"code": 1}, 1),
        ([LOST, LOST], {"code": 75}, LOST),  # the record is of an earlier start
        ([0, 0], {"code": 50}, 0),
    ],
)
@pytest.mark.parametrize("signals", [[], [signal.SIGTERM]])
def test_a_run_ends_with_the_code_of_the_rank_that_has_a_reason(
    signals: list[int], codes: list[int], ending: dict[str, Any] | None, expected: int
) -> None:
    assert local.verdict(codes, signals, ending) == expected


@pytest.mark.parametrize(
    ("codes", "error", "sentence"),
    [
        (
            [-signal.SIGKILL, 1],
            RankLostError,
            r"the ranks were killed by SIGKILL .*\(often out of memory: see dmesg\)",
        ),
        (
            [-signal.SIGABRT, -signal.SIGKILL],
            RankLostError,
            r"the ranks were killed by SIGABRT .*\(see their output above",
        ),
        ([-signal.SIGALRM], RankLostError, r"the ranks were killed by SIGALRM "),
        ([-signal.SIGSEGV], LaunchError, r"were killed by SIGSEGV .*\(see their output above"),
        ([1, -signal.SIGKILL], LaunchError, r"the ranks ended with code 1 "),
        ([0, 1], LaunchError, r"the ranks ended with code 1 .*\(see their output above\)"),
        ([2, 2], LaunchError, r"the ranks ended with code 2 "),
    ],
)
@pytest.mark.parametrize("ending", [None, {"code": 75}])
def test_of_ranks_without_a_reason_only_those_killed_or_aborted_are_lost(
    ending: dict[str, Any] | None, codes: list[int], error: type[MegabackError], sentence: str
) -> None:
    with pytest.raises(error, match=sentence):
        local.verdict(codes, [], ending)


def test_the_last_phases_of_ranks_without_a_reason_are_reported() -> None:
    seen = "rank 0 (node, process 7) is dead; its last heartbeat was at step 3, computing"
    with pytest.raises(RankLostError, match=re.escape(f"; {seen}; run the same command again")):
        local.verdict([-signal.SIGALRM], [], None, last_seen=seen)


UNSAVED = [[-signal.SIGTERM] * 2, [0, -signal.SIGKILL], [1], [130, 130]]


@pytest.mark.parametrize("codes", UNSAVED)
@pytest.mark.parametrize("signals", [[signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]])
def test_ranks_killed_by_a_signal_while_starting_are_preempted(
    signals: list[int], codes: list[int]
) -> None:
    with pytest.raises(PreemptedError, match="asked to stop while starting"):
        local.verdict(codes, signals, None)


@pytest.mark.parametrize("codes", UNSAVED)
def test_ctrl_c_before_the_first_step_has_nothing_to_save(codes: list[int]) -> None:
    with pytest.raises(UserInterruptError, match="interrupted before the first step"):
        local.verdict(codes, [signal.SIGINT], None)


@pytest.mark.parametrize("codes", UNSAVED)
@pytest.mark.parametrize(
    ("signals", "error", "sentence"),
    [
        ([signal.SIGTERM], LaunchError, "were asked to stop, but .* before they saved"),
        ([signal.SIGINT] * 2, UserInterruptError, "interrupted before the ranks had saved"),
    ],
)
def test_a_run_that_trained_but_did_not_save_is_reported_as_such(
    signals: list[int], error: type[MegabackError], sentence: str, codes: list[int]
) -> None:
    with pytest.raises(error, match=f"{sentence}.* to resume from the newest checkpoint"):
        local.verdict(codes, signals, None, has_trained=True)


def test_every_error_code_but_that_of_a_traceback_is_a_reason() -> None:
    reasons = local.reasons()

    assert MegabackError.exit_code not in reasons
    assert {NonFiniteError.exit_code, PreemptedError.exit_code, LOST} <= reasons
