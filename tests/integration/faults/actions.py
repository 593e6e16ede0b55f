"""Actions on a running launcher and its ranks."""

import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from megaback.faults.heartbeat import read_heartbeat
from megaback.run_folder import heartbeat_path


def ranks_of(launcher: "subprocess.Popen[str]") -> list[psutil.Process]:
    """The ranks, by number."""
    found = [
        process
        for process in psutil.Process(launcher.pid).children()
        if "megaback.train" in process.cmdline()
    ]
    return sorted(found, key=lambda process: (process.create_time(), process.pid))


def signal_rank(number: signal.Signals, rank: int) -> Callable[[Any, Path], None]:
    """Send a signal to one rank."""
    return lambda launcher, _run: ranks_of(launcher)[rank].send_signal(number)


def signal_ranks(number: signal.Signals) -> Callable[[Any, Path], None]:
    """Send a signal to all ranks."""

    def act(launcher: "subprocess.Popen[str]", _run: Path) -> None:
        for process in ranks_of(launcher):
            process.send_signal(number)

    return act


def signal_launcher(number: signal.Signals) -> Callable[[Any, Path], None]:
    """Send a signal to `megaback train`."""

    def act(launcher: "subprocess.Popen[str]", _run: Path) -> None:
        ranks = ranks_of(launcher)
        launcher.send_signal(number)
        psutil.wait_procs(ranks, timeout=60)  # they may survive it

    return act


def end_reader_and_interrupt(launcher: "subprocess.Popen[str]", run: Path) -> None:
    """Ctrl-C in a terminal, which also interrupts the reader of the pipe."""
    assert launcher.stdout is not None
    launcher.stdout.close()
    signal_launcher(signal.SIGINT)(launcher, run)


def kill_while_the_other_blocks(launcher: "subprocess.Popen[str]", run: Path) -> None:
    """Kill rank 1 once rank 0 is in one phase for a second."""
    path = heartbeat_path(run, 0)
    while (beat := read_heartbeat(path)) is None or beat.written - beat.since < 1:
        time.sleep(0.05)
    signal_rank(signal.SIGKILL, 1)(launcher, run)


def start_again_and_release(launcher: "subprocess.Popen[str]", run: Path) -> None:
    """Let a requeued start of the same job train to its end; then release the older start."""
    older = psutil.Process(launcher.pid)
    environment = {**older.environ(), "SLURM_RESTART_COUNT": "1", "FAULT": "null"}
    newer = subprocess.run(
        older.cmdline(), env=environment, cwd=older.cwd(), capture_output=True, text=True
    )
    assert newer.returncode == 0, newer.stdout + newer.stderr
    assert launcher.poll() is None
    left = contents_of(run)
    Path(f"{run}.released").touch()
    launcher.wait(60)
    assert contents_of(run) == left


def contents_of(run: Path) -> dict[str, tuple[int, bytes]]:
    """Time of the last change, and content, of every file of a run."""
    return {
        str(path): (path.stat().st_mtime_ns, path.read_bytes())
        for path in run.rglob("*")
        if path.is_file()
    }
