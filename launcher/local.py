"""`megaback train`: start one rank a device on this machine, and stay with them to their end.

What cannot work is refused before a rank starts. Signals to this process reach all ranks at once,
which save together; when a rank dies, the others are given the time to say so.
(`deepspeed megaback/train.py CONFIG` starts the same ranks: decision 13 says why this does not.)
"""

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import click

from data_pipeline import errors
from data_pipeline.command import Command
from data_pipeline.errors import LaunchError, MegabackError, PreemptedError
from megaback.config import Config, load_config
from megaback.exit_record import read_exit, record_exit
from megaback.run_data import open_data
from megaback.stopping import LAUNCHER_VARIABLE, deadline_of

_RANK_MODULE = "megaback.train"
_GRACE_S = 10.0
_POLL_S = 0.05


def count_devices() -> int:
    """GPUs that ranks here may use: CUDA_VISIBLE_DEVICES, else the device files of the driver."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([name for name in visible.split(",") if name.strip() not in ("", "-1")])
    return len([path for path in Path("/dev").glob("nvidia*") if path.name[6:].isdigit()])


def plan_ranks(config: Config) -> tuple[str, int]:
    """The device and the number of ranks for this machine."""
    devices = count_devices()
    device = config.hardware.device
    if device == "auto":
        device = "cuda" if devices else "cpu"
    return device, config.hardware.processes or (devices if device == "cuda" else 1) or 1


def rank_environment(device: str, processes: int) -> dict[str, str]:
    """The environment of the ranks: this one, quiet, with the cores shared out."""
    environment = dict(os.environ)
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(cores // processes, 1)))
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    return environment


def rank_names(processes: int) -> list[dict[str, str]]:
    """The variables that tell each rank which one it is, and where they meet."""
    common = {
        "WORLD_SIZE": str(processes),
        "LOCAL_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(_free_port()),
    }
    return [common | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(processes)]


def run_ranks(
    command: Sequence[str], environment: dict[str, str], processes: int
) -> tuple[list[int], bool]:
    """Run all ranks to their end, passing signals on to every one.

    Returns their exit codes (negative: the signal that killed it), in the order in which they
    ended, and whether there was a signal.
    """
    ranks: list[subprocess.Popen[bytes]] = []
    with _passing_signals(ranks) as received:
        for names in rank_names(processes):
            variables = environment | names | {LAUNCHER_VARIABLE: str(os.getpid())}
            # A session of its own: a terminal's Ctrl-C is passed on, once, by this process.
            ranks.append(subprocess.Popen(command, env=variables, start_new_session=True))
        for number in received:  # for those that were not there yet
            for process in ranks:
                process.send_signal(number)
        return _wait(ranks), bool(received)


def _wait(ranks: list["subprocess.Popen[bytes]"]) -> list[int]:
    codes: list[int] = []
    running = list(ranks)
    give_up = None
    while running:
        for process in list(running):
            code = process.poll()
            if code is not None:
                running.remove(process)
                codes.append(code)
                if code and give_up is None:
                    give_up = time.monotonic() + _GRACE_S
        if give_up is not None and time.monotonic() > give_up:
            for process in running:
                process.kill()
        time.sleep(_POLL_S)
    return codes


@contextmanager
def _passing_signals(ranks: list["subprocess.Popen[bytes]"]) -> Iterator[list[int]]:
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        for process in ranks:
            if process.poll() is None:
                process.send_signal(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
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


def _reasons() -> set[int]:
    """Exit codes with which a rank has said why it ends."""
    family = [value for value in vars(errors).values() if isinstance(value, type)]
    codes = {kind.exit_code for kind in family if issubclass(kind, MegabackError)}
    return codes - {MegabackError.exit_code}


def _verdict(codes: list[int], was_signalled: bool, ending: dict[str, Any] | None) -> int:
    """The exit code of the run. Raises what the ranks could not say themselves.

    `ending` is what the first rank to know a reason has recorded; the others may have ended for
    want of that one.
    """
    if ending is not None and ending.get("code") in codes:
        return int(ending["code"])
    said = [code for code in codes if code in _reasons()]
    if said:
        return said[0]
    failed = [code for code in codes if code]
    if not failed:
        return 0
    if was_signalled:
        raise PreemptedError("asked to stop while starting; run the same command to go on")
    code = failed[0]
    names = {number.value: number.name for number in signal.Signals}
    how = f"killed by {names.get(-code, code)}" if code < 0 else f"ended with code {code}"
    advice = "often memory: see dmesg" if code == -signal.SIGKILL else "see the traceback above"
    raise LaunchError(
        f"the ranks were {how}, without a reason of their own ({advice}); "
        "run the same command again to go on"
    )


@click.command(cls=Command, name="train")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--save-before",
    help="Save and stop by a time (2026-11-25T18:00) or after a duration (1h30m).",
)
def main(config: Path, overrides: tuple[str, ...], save_before: str | None) -> None:
    """Train the run that CONFIG describes, with key.sub=value OVERRIDES, on this machine.

    Run the same command again to go on from the newest checkpoint.
    """
    settings = load_config(config, overrides)
    deadline_of(save_before)
    device, processes = plan_ranks(settings)
    open_data(settings, 0, processes)
    command = [sys.executable, "-m", _RANK_MODULE, str(config), *overrides]
    if save_before is not None:
        command += ["--save-before", save_before]
    started = time.time()
    codes, was_signalled = run_ranks(command, rank_environment(device, processes), processes)
    try:
        ending = read_exit(settings.run)
        if ending is not None and ending.get("time", 0.0) < started:
            ending = None  # of an earlier start
        code = _verdict(codes, was_signalled, ending)
    except MegabackError as error:
        record_exit(settings.run, error.exit_code, type(error).__name__, str(error))
        raise
    raise SystemExit(code)


if __name__ == "__main__":
    main()
