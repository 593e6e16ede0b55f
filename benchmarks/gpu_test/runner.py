"""Starts the parts as processes, with a time limit each and one for all, and keeps the report."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from benchmarks.gpu_test.registry import Part
from benchmarks.gpu_test.results import PartResult, read_checks, status_of

OUT_OF_TIME = "out of time"
"""Start of the detail of a part that the next start repeats."""
INTERRUPTED = "interrupted"
STILL_RUNNING = "not finished"
NOT_DONE = (OUT_OF_TIME, INTERRUPTED, STILL_RUNNING)
_POLL_S = 0.1
_MIN_PART_S = 20
"""Time for a part to be worth its start."""
_GRACE_S = 5.0
_CPU_FACTOR = 3
"""Limits on a CPU, as a multiple of those on a GPU."""


@dataclass
class _Running:
    part: Part
    process: "subprocess.Popen[bytes]"
    started: float
    limit_s: float
    is_limit_of_all: bool
    num_checks: int = 0


class Runner:
    """The parts that wait, those that run, and what is written after each."""

    def __init__(
        self,
        work: Path,
        size: str,
        device: str,
        record: Callable[[PartResult], None],
        *,
        jobs: int,
        limit_s: float,
    ) -> None:
        """`record` gets a part's results whenever there are more; `limit_s`: time for all parts."""
        self._work, self._size, self._device = work, size, device
        self._record, self._jobs = record, jobs
        self._end = time.monotonic() + limit_s
        self._running: list[_Running] = []

    def run(self, parts: Sequence[Part]) -> None:
        """Run parts in their order; those that may run beside others do."""
        waiting = list(parts)
        try:
            while waiting or self._running:
                while waiting and self._has_room(waiting[0]):
                    self._start(waiting.pop(0))
                time.sleep(_POLL_S)
                for one in list(self._running):
                    self._look_after(one)
        except KeyboardInterrupt:
            for one in list(self._running):
                self._end_part(one, INTERRUPTED)
            raise

    def _has_room(self, part: Part) -> bool:
        if not self._running:
            return True
        is_beside = not part.is_alone and not self._running[0].part.is_alone
        return is_beside and len(self._running) < self._jobs

    def _limit_of(self, part: Part) -> float:
        return part.limit_s * (_CPU_FACTOR if self._device == "cpu" else 1)

    def _start(self, part: Part) -> None:
        left_s = self._end - time.monotonic()
        if left_s < _MIN_PART_S:
            self._report(part, 0.0, f"{OUT_OF_TIME}; the same command continues")
            return
        print(f"{part.name}: {part.title}", flush=True)
        with log_path(self._work, part).open("wb") as log:
            process = subprocess.Popen(
                part_command((part.name,), self._work, self._size),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        limit_s = min(self._limit_of(part), left_s)
        self._running.append(_Running(part, process, time.monotonic(), limit_s, limit_s == left_s))

    def _look_after(self, one: _Running) -> None:
        code = one.process.poll()
        if code is None:
            if time.monotonic() - one.started > one.limit_s:
                text = f"was ended after its limit of {one.limit_s:.0f} s"
                if one.is_limit_of_all:
                    text = f"{OUT_OF_TIME} after {one.limit_s:.0f} s; the same command repeats it"
                self._end_part(one, text)
                return
            checks = read_checks(self._results_of(one.part))
            if len(checks) > one.num_checks:  # so that whatever ends this process loses nothing
                one.num_checks = len(checks)
                self._report(one.part, time.monotonic() - one.started, STILL_RUNNING)
            return
        problem = ""
        if code < 0:
            problem = f"was ended by {signal.Signals(-code).name}; see logs.txt"
        elif code and not self._has_failed(one.part):
            problem = f"ended with {code}; see logs.txt"
        self._stop(one, problem)

    def _results_of(self, part: Part) -> Path:
        return self._work / f"{part.name}.jsonl"

    def _has_failed(self, part: Part) -> bool:
        checks = read_checks(self._results_of(part))
        return any(check.status == "failed" for check in checks)

    def _end_part(self, one: _Running, problem: str) -> None:
        """End a part's processes, which are a group."""
        for number, wait_s in ((signal.SIGTERM, _GRACE_S), (signal.SIGKILL, _GRACE_S)):
            with suppress(ProcessLookupError):
                os.killpg(one.process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                one.process.wait(wait_s)
                break
        with suppress(ProcessLookupError):
            os.killpg(one.process.pid, signal.SIGKILL)
        self._stop(one, problem)

    def _stop(self, one: _Running, problem: str) -> None:
        self._running.remove(one)
        self._report(one.part, time.monotonic() - one.started, problem)

    def _report(self, part: Part, seconds: float, problem: str) -> None:
        checks = read_checks(self._results_of(part)) if seconds else ()
        status = status_of(checks, problem)
        is_late = problem.startswith(NOT_DONE)
        if is_late and all(check.status != "failed" for check in checks):
            status = "skipped"
        self._record(
            PartResult(
                name=part.name,
                title=part.title,
                device=self._device,
                seconds=round(seconds, 1),
                status=status,
                detail=problem,
                checks=checks,
            )
        )


def log_path(work: Path, part: Part) -> Path:
    """File of all that a part prints."""
    return work / f"{part.name}.log"


def part_command(parts: Sequence[str], work: Path, size: str) -> list[str]:
    """Command of the process that runs some parts."""
    return [
        *(sys.executable, "-m", "benchmarks.gpu_test.part", ",".join(parts)),
        *("--work", str(work), "--size", size),
    ]
