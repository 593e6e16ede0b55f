"""A run stops on a signal and at its deadline; the same signal again ends it at once."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, UserInterruptError
from megaback.environment import LAUNCHER_VARIABLE
from megaback.faults.stop_request import StopRequest, deadline_of, local_time_of

Start = Callable[..., "Rank"]
NAMES = ["SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"]
HOUR_S = 3600
MARGIN_S = 60

# Prints its reason to stop for every line that it reads.
_RANK = """
import sys
from megaback.faults.stop_request import StopRequest
stop = StopRequest()
for line in sys.stdin:
    if line == "train\\n":
        stop.begin_training()
    print(stop.reason, flush=True)
"""
_IGNORING = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_IGN)
os.execv(sys.executable, [sys.executable, "-c", sys.argv[1]])
"""
# Starts a rank that has its input and output, and waits.
_LAUNCHER = """
import os, signal, subprocess, sys
rank, variable = sys.argv[1:]
environment = {**os.environ, variable: str(os.getpid())}
subprocess.Popen([sys.executable, "-c", rank], env=environment)
signal.pause()
"""


class Rank:
    """A process that prints its reason to stop on request."""

    def __init__(self, *script: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", *script],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def reason(self, asked: str = "train") -> str:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(f"{asked}\n")
        self.process.stdin.flush()
        return self.process.stdout.readline().rstrip()

    def receive(self, name: str) -> None:
        self.process.send_signal(signal.Signals[name])


@pytest.fixture(autouse=True)
def signals_that_a_terminal_sends() -> Iterator[None]:
    """Child processes do not ignore them, even if the tests run by `nohup` or in a script."""
    numbers = (signal.SIGINT, signal.SIGHUP)
    before = [signal.signal(number, signal.default_int_handler) for number in numbers]
    yield
    for number, handler in zip(numbers, before, strict=True):
        signal.signal(number, handler)


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither Slurm nor a launcher has started us."""
    for name in ("SLURM_JOB_END_TIME", "SLURM_PROCID", LAUNCHER_VARIABLE):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def start() -> Iterator[Start]:
    """`start(script, *arguments)`: a rank that handles signals when it is returned."""
    ranks: list[Rank] = []

    def make(*script: str) -> Rank:
        rank = Rank(*script)
        ranks.append(rank)
        assert rank.reason() == "None"
        return rank

    yield make
    for rank in ranks:
        rank.process.kill()
        rank.process.communicate(timeout=30)


@pytest.fixture
def handlers() -> Iterator[None]:
    """Restores the signal handlers that a StopRequest of this process changes."""
    before = {name: signal.getsignal(signal.Signals[name]) for name in NAMES}
    yield
    for name, handler in before.items():
        signal.signal(signal.Signals[name], handler)


@pytest.mark.parametrize("name", NAMES)
def test_a_signal_is_the_reason_to_stop(name: str, start: Start) -> None:
    rank = start(_RANK)
    rank.receive(name)

    assert rank.reason() == name


@pytest.mark.parametrize("name", NAMES)
def test_the_same_signal_twice_within_a_second_is_one_request(name: str, start: Start) -> None:
    """A launcher and a terminal may both deliver it."""
    rank = start(_RANK)
    for _ in range(2):
        rank.receive(name)
        assert rank.reason() == name


@pytest.mark.parametrize("name", NAMES)
def test_the_same_signal_again_ends_a_rank_at_once(name: str, start: Start) -> None:
    rank = start(_RANK)
    rank.receive(name)
    assert rank.reason() == name
    time.sleep(1.1)
    rank.receive(name)

    assert rank.process.wait(timeout=30) == 128 + signal.Signals[name]


def test_ctrl_c_before_training_ends_a_rank_at_once(start: Start) -> None:
    rank = start(_RANK.replace("stop.begin_training()", "pass"))
    rank.receive("SIGINT")

    assert rank.process.wait(timeout=30) == UserInterruptError.exit_code


def test_the_end_of_the_terminal_is_ignored_under_nohup(start: Start) -> None:
    rank = start(_IGNORING, _RANK)
    rank.receive("SIGHUP")

    assert rank.reason() == "None"


def test_another_signal_is_not_a_repeat(start: Start) -> None:
    """Slurm sends SIGUSR1, then SIGTERM."""
    rank = start(_RANK)
    rank.receive("SIGUSR1")
    assert rank.reason() == "SIGUSR1"
    time.sleep(1.1)
    rank.receive("SIGTERM")

    assert rank.reason() == "SIGUSR1"


def test_a_rank_stops_when_its_launcher_has_ended(start: Start) -> None:
    rank = start(_LAUNCHER, _RANK, LAUNCHER_VARIABLE)
    rank.process.kill()
    rank.process.wait(timeout=30)

    assert rank.reason() == "the launcher has ended"


def test_a_rank_stops_at_its_deadline(handlers: None) -> None:
    stop = StopRequest(time.time() + 0.2)
    assert stop.reason is None
    time.sleep(0.25)

    assert stop.reason == "the deadline"


def test_there_is_no_reason_before_signal_and_deadline(
    handlers: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(LAUNCHER_VARIABLE, str(os.getppid()))

    assert StopRequest(time.time() + HOUR_S).reason is None
    assert deadline_of(None) is None


parts = st.none() | st.integers(0, 200)


@given(parts, parts, parts)
def test_a_duration_counts_from_now_less_the_margin(
    hours: int | None, minutes: int | None, seconds: int | None
) -> None:
    given_parts = [(hours, "h"), (minutes, "m"), (seconds, "s")]
    text = "".join(f"{number}{unit}" for number, unit in given_parts if number is not None)
    if not text:
        return
    duration_s = HOUR_S * (hours or 0) + 60 * (minutes or 0) + (seconds or 0)
    margin_s = min(MARGIN_S, duration_s / 10)
    earliest = time.time()
    deadline = deadline_of(text)

    assert deadline is not None
    assert earliest <= deadline - duration_s + margin_s + 1e-3
    assert deadline - duration_s + margin_s - 1e-3 <= time.time()


@pytest.mark.parametrize("zone", [None, timezone.utc, timezone(timedelta(hours=-7))])
@pytest.mark.parametrize("separator", ["T", " "])
def test_a_time_without_a_zone_is_local(separator: str, zone: timezone | None) -> None:
    end = int(time.time()) + HOUR_S

    assert deadline_of(datetime.fromtimestamp(end, zone).isoformat(separator)) == end - MARGIN_S


def test_the_margin_is_a_tenth_of_a_short_time() -> None:
    now = time.time()
    end = int(now) + 100

    deadline = deadline_of(datetime.fromtimestamp(end).isoformat())

    assert deadline == pytest.approx(end - (end - now) / 10, abs=1)


def test_a_time_in_the_past_has_no_margin() -> None:
    end = int(time.time()) - HOUR_S

    assert deadline_of(datetime.fromtimestamp(end).isoformat()) == end


@pytest.mark.parametrize(
    "text",
    [
        "",
        "soon",
        "h",
        "30",
        "1h30",
        "1m1h",
        "1d",
        "-1h",
        "1.5h",
        " 1h",
        "2026-13-01T00:00",
        "18:00",
    ],
)
def test_text_that_is_neither_a_time_nor_a_duration_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=f"`save_before` '{text}' is neither a time like"):
        deadline_of(text)


def test_slurms_limit_is_a_deadline_only_in_slurm_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    end = int(time.time()) + HOUR_S
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(end))
    assert deadline_of(None) is None
    monkeypatch.setenv("SLURM_PROCID", "0")

    assert deadline_of(None) == end - MARGIN_S


@pytest.mark.parametrize("text", ["", "Unknown", "-5"])
def test_an_invalid_end_of_the_job_is_ignored(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", text)
    monkeypatch.setenv("SLURM_PROCID", "0")

    assert deadline_of(None) is None


@pytest.mark.parametrize(("asked_hours", "slurm_hours"), [(1, 2), (2, 1)])
def test_the_earlier_of_save_before_and_slurms_limit_counts(
    asked_hours: int, slurm_hours: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = int(time.time())
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(now + slurm_hours * HOUR_S))
    monkeypatch.setenv("SLURM_PROCID", "0")

    deadline = deadline_of(datetime.fromtimestamp(now + asked_hours * HOUR_S).isoformat())

    assert deadline == now + HOUR_S - MARGIN_S


def test_a_duration_becomes_a_time_that_later_runs_keep(monkeypatch: pytest.MonkeyPatch) -> None:
    now = time.time()
    text = local_time_of("1h")
    monkeypatch.setattr(time, "time", lambda: now + HOUR_S / 2)

    assert deadline_of(text) == pytest.approx(now + HOUR_S - MARGIN_S, abs=5)
    assert local_time_of(None) is None
