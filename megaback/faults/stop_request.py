"""Early stop of a run: on a signal, near a deadline, or when the launcher has ended.

Each rank checks by itself; the ranks agree at the next step boundary, so a signal to any one of
them suffices.
"""

import os
import re
import signal
import time
from contextlib import suppress
from datetime import datetime
from types import FrameType

from data_pipeline.errors import ConfigError, UserInterruptError
from megaback.environment import LAUNCHER_VARIABLE

_MARGIN_S = 60.0
_SAME_REQUEST_S = 1.0
_DURATION = re.compile(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?")


def exit_at_ctrl_c() -> None:
    """Let Ctrl-C end this rank at once, without a traceback, until there is a StopRequest."""
    signal.signal(signal.SIGINT, lambda *_: _exit_while_starting())
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])


class StopRequest:
    """Request to stop, set by a signal, a deadline or the launcher's end; checked between steps.

    The signals are SIGTERM, SIGUSR1, SIGINT (Ctrl-C) and, unless ignored (`nohup`), SIGHUP (the
    terminal was closed). The same signal again ends this rank at once, without saving. A launcher
    and a terminal may both deliver it, so repeats within a second are ignored; another signal is
    not a repeat (Slurm sends SIGUSR1, then SIGTERM). Before `begin_training` there is nothing to
    save, and Ctrl-C ends the rank at once.
    """

    def __init__(self, deadline: float | None = None) -> None:
        """`deadline` is in seconds since the epoch."""
        self._signal: str | None = None
        self._deadline = deadline
        self._launcher = int(os.environ.get(LAUNCHER_VARIABLE, "0"))
        self._received: dict[int, float] = {}
        self._is_training = False
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)
        if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
            signal.signal(signal.SIGHUP, self._receive)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # the launcher blocks it

    def begin_training(self) -> None:
        """Stop at the next step boundary on Ctrl-C from now on: there may be something to save."""
        self._is_training = True

    @property
    def is_interrupt(self) -> bool:
        """Whether the stop was requested by Ctrl-C."""
        return self._signal == signal.SIGINT.name

    @property
    def reason(self) -> str | None:
        """Reason to stop, or None."""
        if self._signal is not None:
            return self._signal
        if self._deadline is not None and time.time() >= self._deadline:
            return "the deadline"
        if self._launcher and os.getppid() != self._launcher:
            return "the launcher has ended"
        return None

    def _receive(self, number: int, _frame: FrameType | None) -> None:
        if number == signal.SIGINT and not self._is_training:
            _exit_while_starting()
        now = time.monotonic()
        if now - self._received.get(number, now) > _SAME_REQUEST_S:
            os._exit(128 + number)
        self._received.setdefault(number, now)
        self._signal = self._signal or signal.Signals(number).name


def _exit_while_starting() -> None:
    if LAUNCHER_VARIABLE not in os.environ:  # else the launcher reports it, for all ranks
        with suppress(OSError):
            os.write(2, b"megaback: error: interrupted before the first step\n")
    os._exit(UserInterruptError.exit_code)


def deadline_of(save_before: str | None) -> float | None:
    """Time to stop, in seconds since the epoch: shortly before `save_before` or Slurm's limit.

    `save_before` is a local time (2026-11-25T18:00) or a duration from now (1h30m). The margin is
    a minute, or a tenth of the remaining time if that is less. Raises ConfigError.
    """
    now = time.time()
    ends = []
    if save_before is not None:
        ends.append(_parse(save_before, now))
    slurm_end = os.environ.get("SLURM_JOB_END_TIME", "")  # since Slurm 22.05
    if slurm_end.isdigit() and "SLURM_PROCID" in os.environ:
        ends.append(float(slurm_end))
    if not ends:
        return None
    end = min(ends)
    return end - min(_MARGIN_S, max(end - now, 0) / 10)


def local_time_of(save_before: str | None) -> str | None:
    """`save_before` as a time: a duration counts from now, also for runs that start later.

    Raises ConfigError.
    """
    if save_before is None:
        return None
    return datetime.fromtimestamp(_parse(save_before, time.time())).astimezone().isoformat()


def _parse(text: str, now: float) -> float:
    found = _DURATION.fullmatch(text)
    try:
        if text and found is not None:
            hours, minutes, seconds = (int(part or 0) for part in found.groups())
            return now + float(3600 * hours + 60 * minutes + seconds)
        return datetime.fromisoformat(text).timestamp()
    except (ValueError, OverflowError):
        raise ConfigError(
            f"`save_before` {text!r} is neither a time like 2026-11-25T18:00 nor a duration like "
            "1h30m"
        ) from None
