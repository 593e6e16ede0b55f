"""`megaback train`: start one rank a device on this machine, through the deepspeed launcher.

What cannot work is refused before a rank starts. Signals to this process reach the ranks
themselves, which save together: the deepspeed launcher would let them run on as orphans.
"""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from types import FrameType

import click
import psutil

from data_pipeline import errors
from data_pipeline.command import Command
from data_pipeline.errors import LaunchError, MegabackError, PreemptedError
from megaback.config import Config, load_config
from megaback.run_data import open_data

_RANK_MODULE = "megaback.train"


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


def launch_command(config_path: Path, overrides: tuple[str, ...], processes: int) -> list[str]:
    """The deepspeed command that starts the ranks."""
    return [
        sys.executable,
        "-m",
        "deepspeed.launcher.runner",
        "--log_level=critical",  # how the ranks ended, they have said themselves
        "--num_gpus",
        str(processes),
        "--master_port",
        str(_free_port()),
        "--no_local_rank",
        "--module",
        _RANK_MODULE,
        str(config_path),
        *overrides,
    ]


def rank_environment(device: str, processes: int) -> dict[str, str]:
    """The environment of the ranks: this one, quiet, with the cores shared out."""
    environment = dict(os.environ)
    if device == "cpu":
        environment["DS_ACCELERATOR"] = "cpu"
        cores = len(os.sched_getaffinity(0))
        environment.setdefault("OMP_NUM_THREADS", str(max(cores // processes, 1)))
    environment.setdefault("PYTHONWARNINGS", "ignore::FutureWarning")
    return environment


def run_ranks(command: list[str], environment: dict[str, str]) -> tuple[int, bool]:
    """Run the launcher to its end, passing signals on to every rank at once.

    Returns its exit code, and whether there was a signal.
    """
    launcher = subprocess.Popen(command, env=environment, start_new_session=True)
    received: list[int] = []

    def pass_on(number: int, _frame: FrameType | None) -> None:
        received.append(number)
        ranks = _rank_processes(launcher.pid)
        for process in ranks:
            process.send_signal(number)
        if not ranks:  # still starting: there is nothing to save
            launcher.terminate()

    previous = {
        number: signal.signal(number, pass_on)
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
    }
    try:
        return launcher.wait(), bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _rank_processes(launcher_pid: int) -> list[psutil.Process]:
    ranks = []
    for process in psutil.Process(launcher_pid).children(recursive=True):
        try:
            words = process.cmdline()
        except psutil.Error:
            continue
        # The launcher's own processes have the module among their later arguments.
        if words[1:4] == ["-u", "-m", _RANK_MODULE]:
            ranks.append(process)
    return ranks


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _known_codes() -> set[int]:
    family = [value for value in vars(errors).values() if isinstance(value, type)]
    return {kind.exit_code for kind in family if issubclass(kind, MegabackError)}


@click.command(cls=Command, name="train")
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
def main(config: Path, overrides: tuple[str, ...]) -> None:
    """Train the run that CONFIG describes, with key.sub=value OVERRIDES, on this machine.

    Run the same command again to go on from the newest checkpoint.
    """
    settings = load_config(config, overrides)
    device, processes = plan_ranks(settings)
    open_data(settings, 0, processes)
    command = launch_command(config, overrides, processes)
    code, was_signalled = run_ranks(command, rank_environment(device, processes))
    if was_signalled and code not in {0, *_known_codes()}:
        raise PreemptedError("asked to stop while starting; run the same command to go on")
    if code not in {0, *_known_codes()}:
        raise LaunchError(
            f"the ranks ended with code {code}, without a reason of their own; "
            "look for the first traceback above, and run the same command again to go on"
        )
    raise SystemExit(code)


if __name__ == "__main__":
    main()
