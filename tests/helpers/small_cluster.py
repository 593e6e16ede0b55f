"""Slurm commands for the cluster tests, as a user types them.

State comes from `scontrol show job` rather than accounting, as on a cluster without slurmdbd.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import psutil

from megaback.run_folder import METRICS_NAME
from megaback.tracking.metrics import read_metrics
from tests.helpers.paths import ROOT

REPOSITORY = ROOT
SLURM_FILES = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
SOURCED_FILES = sorted((REPOSITORY / "slurm").glob("*.sh"))
NUM_NODES = 4
NUM_STEPS = 40  # a little more than one epoch of the small data set
SMALL_JOB = ("--devices-per-node=1", "--cpus-per-task=1", "--mem=4000", "--time=10")
"""Resource options of `megaback submit` for this cluster."""

MINISLURM = ROOT / "tests" / "cluster" / "minislurm.sh"
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "unshare", "flock")
_STOPPED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Slurm:
    """Commands of Slurm, as a user types them."""

    environment: dict[str, str]

    def attempt(
        self, *words: object, cwd: Path | None = None, **variables: object
    ) -> subprocess.CompletedProcess[str]:
        """Run a command, with additional environment variables."""
        return subprocess.run(
            [str(word) for word in words],
            env=self.environment | {name: str(value) for name, value in variables.items()},
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    def command(self, *words: object, cwd: Path | None = None, **variables: object) -> str:
        """Run a command that must not fail. Returns its output."""
        done = self.attempt(*words, cwd=cwd, **variables)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(
        self, file_name: str, *arguments: object, cwd: Path, options: str = "", **variables: object
    ) -> str:
        """Submit one of the shipped sbatch files. Returns the job's id."""
        shipped = REPOSITORY / "slurm" / file_name
        words = ("sbatch", "--parsable", *options.split(), shipped, *arguments)
        return self.command(*words, cwd=cwd, **variables).strip()

    def megaback(self, *words: object, cwd: Path) -> str:
        """Run a megaback command that must not fail, in the tests' environment."""
        return self.command(sys.executable, "-m", "megaback", *words, cwd=cwd)

    def elements(self, job_id: str) -> list[dict[str, str]]:
        """Fields of `scontrol show job`, per element of an array; pending ones are one entry."""
        lines = self.command("scontrol", "--oneliner", "show", "job", job_id).splitlines()
        return [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in lines
            if line.strip()
        ]

    def job(self, job_id: str) -> dict[str, str]:
        """Fields of a job; for an array, of an element that is not complete, if any."""
        elements = self.elements(job_id)
        return next((job for job in elements if job["JobState"] != "COMPLETED"), elements[0])

    def wait(self, job_id: str, cwd: Path, timeout_s: float = 280) -> dict[str, str]:
        """Wait until a job, or every element of an array, has ended in any state."""

        def states() -> list[str]:
            return [job["JobState"] for job in self.elements(job_id)]

        wait_for(
            lambda: set(states()) <= _STOPPED,
            timeout_s,
            lambda: f"job {job_id} is {states()}\n{read_log(cwd, job_id)}",
        )
        return self.job(job_id)

    def require_completed(self, job_id: str, cwd: Path) -> dict[str, str]:
        job = self.wait(job_id, cwd)
        assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), read_log(cwd, job_id)
        return job


@contextmanager
def running_cluster(**settings: object) -> Iterator[Slurm]:
    """A cluster that is stopped at the end; `settings` are variables of minislurm.sh."""
    # munged refuses a socket in pytest's folders, which other users cannot read.
    folder = Path(tempfile.mkdtemp(prefix="megaback-slurm-"))
    folder.chmod(0o755)
    environment = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("SLURM_", "SBATCH_", "MASTER_"))
        and name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE")
    } | {
        "MINISLURM_DIR": str(folder),
        "MINISLURM_NODES": str(NUM_NODES),
        "MINISLURM_CPUS": "64",
        "MINISLURM_MEM": "64000",
        "MINISLURM_GPUS": "8",
        "MINISLURM_PORT": str(free_ports(NUM_NODES + 1)),
        "MINISLURM_KILLWAIT": "10",  # Slurm's default is 30
        "SLURM_CONF": str(folder / "slurm.conf"),
        "MEGABACK_ENV": str(Path(sys.executable).parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    cluster = Slurm(environment | {name: str(value) for name, value in settings.items()})
    try:
        cluster.command("bash", MINISLURM, "up")
        yield cluster
    finally:
        cluster.command("bash", MINISLURM, "down")


def wait_for(
    condition: Callable[[], bool], timeout_s: float, explain: Callable[[], str] = lambda: ""
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {explain()}"
        time.sleep(0.05)


def read_log(cwd: Path, job_id: str) -> str:
    """The job's output, from the file that the sbatch files and `megaback submit` configure."""
    folders = (cwd, *cwd.glob("*/logs"))
    paths = [path for folder in folders for path in folder.glob(f"*-{job_id}.out")]
    paths += [path for folder in folders for path in sorted(folder.glob(f"*-{job_id}_*.out"))]
    return "".join(path.read_text() for path in paths)


def cpu_options(nodes: int = 2, tasks_per_node: int = 1, gpus_per_node: int = 0) -> str:
    """Options that turn the shipped train.sbatch from GPU nodes to small CPU tasks."""
    return (
        f"--nodes={nodes} --ntasks-per-node={tasks_per_node} --cpus-per-task=1 "
        f"--gpus-per-node={gpus_per_node} --mem=4000 --time=10"
    )


def last_step(run: Path) -> int:
    """The newest step of a run's metrics; 0 before there is one."""
    if not (run / METRICS_NAME).exists():
        return 0
    return max((line["step"] for line in read_metrics(run)), default=0)


def ranks_of(config: Path) -> list[psutil.Process]:
    """The rank processes of a config; all are visible from outside a node's namespace."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"].startswith("python")
        and (process.info["cmdline"] or [])[1:4] == ["-m", "megaback.train", str(config)]
    ]


def loads_torch(process: psutil.Process) -> bool:
    """Whether a process has begun to import torch."""
    try:
        return "libtorch" in Path(f"/proc/{process.pid}/maps").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def why_no_cluster() -> str | None:
    """The reason why this machine cannot run a private cluster, or None."""
    if os.geteuid() != 0:
        return "a Slurm cluster on one machine needs root"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    namespaces = ["unshare", "--pid", "--mount", "--uts", "--fork", "true"]
    if subprocess.run(namespaces, capture_output=True, check=False).returncode:
        return "this machine does not allow namespaces of processes and mounts"
    return None


def why_no_networks() -> str | None:
    """The reason why the nodes cannot have networks of their own here, or None."""
    name = f"megaback-{os.getpid()}"
    try:
        for command in (("netns", "add", name), ("link", "add", name[-12:], "type", "bridge")):
            subprocess.run(["ip", *command], capture_output=True, check=True)
    except (FileNotFoundError, subprocess.CalledProcessError):
        return "this machine does not allow namespaces of networks (or lacks iproute2)"
    finally:
        with suppress(FileNotFoundError):
            for command in (("netns", "del", name), ("link", "del", name[-12:])):
                subprocess.run(["ip", *command], capture_output=True, check=False)
    return None


def free_ports(count: int) -> int:
    """The first of `count` consecutive free ports."""
    for first in range(26_800 + os.getpid() % 1000, 32_000, count):
        probes = [socket.socket() for _ in range(count)]
        try:
            for offset, probe in enumerate(probes):
                probe.bind(("", first + offset))
        except OSError:
            continue
        else:
            return first
        finally:
            for probe in probes:
                probe.close()
    raise RuntimeError("no free ports for Slurm's daemons")


@contextmanager
def held(config: Path) -> Iterator[list[psutil.Process]]:
    """Suspend the ranks of a config until the block ends."""
    ranks = ranks_of(config)
    for rank in ranks:
        rank.send_signal(signal.SIGSTOP)
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.send_signal(signal.SIGCONT)


@dataclass(frozen=True, kw_only=True)
class FinishedRun:
    """An undisturbed run, and the folders that were empty before it."""

    run: Path
    folder: Path
    home: Path
    temporary: Path
    log: str
