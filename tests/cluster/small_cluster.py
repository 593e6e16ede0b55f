"""What the tests ask of a Slurm cluster, in the words that a user types.

Nothing here reads accounting: state comes from `scontrol show job`, as on a cluster without
slurmdbd.
"""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).parents[2]
SLURM_FILES = sorted((REPOSITORY / "slurm").glob("*.sbatch"))
NUM_NODES = 2
NUM_STEPS = 40  # a little more than one epoch of the small data set

MINISLURM = Path(__file__).with_name("minislurm.sh")
_PROGRAMS = ("slurmctld", "slurmd", "munged", "sbatch", "srun", "scontrol", "unshare", "flock")
_STOPPED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"}


@dataclass(frozen=True)
class Slurm:
    """Commands of Slurm, as a user types them."""

    environment: dict[str, str]

    def command(self, *words: object, cwd: Path | None = None) -> str:
        done = subprocess.run(
            [str(word) for word in words],
            env=self.environment,
            cwd=cwd,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
        return done.stdout + done.stderr

    def submit(self, file_name: str, *arguments: object, cwd: Path, options: str = "") -> str:
        """Queue one of the shipped files. Returns the job's id."""
        shipped = REPOSITORY / "slurm" / file_name
        answer = self.command(
            "sbatch", "--parsable", *options.split(), shipped, *arguments, cwd=cwd
        )
        return answer.strip()

    def elements(self, job_id: str) -> list[dict[str, str]]:
        """What `scontrol show job` knows: of an array, each element, those that wait together."""
        lines = self.command("scontrol", "--oneliner", "show", "job", job_id).splitlines()
        return [
            dict(word.split("=", 1) for word in line.split() if "=" in word)
            for line in lines
            if line.strip()
        ]

    def job(self, job_id: str) -> dict[str, str]:
        """What is known of a job; of an array, of an element that is not complete, if any."""
        elements = self.elements(job_id)
        return next((job for job in elements if job["JobState"] != "COMPLETED"), elements[0])

    def wait(self, job_id: str, cwd: Path, timeout_s: float = 280) -> dict[str, str]:
        """Wait until a job, or every element of an array, is over, in whatever way."""

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


def wait_for(
    condition: Callable[[], bool], timeout_s: float, explain: Callable[[], str] = lambda: ""
) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, f"not within {timeout_s} s: {explain()}"
        time.sleep(0.05)


def read_log(cwd: Path, job_id: str) -> str:
    """The job's output, in the file that the shipped files name."""
    paths = [*cwd.glob(f"*-{job_id}.out"), *sorted(cwd.glob(f"*-{job_id}_*.out"))]
    return "".join(path.read_text() for path in paths)


def cpu_options(nodes: int = NUM_NODES, tasks_per_node: int = 1) -> str:
    """What turns the shipped train.sbatch from GPU nodes to small CPU tasks."""
    return (
        f"--nodes={nodes} --ntasks-per-node={tasks_per_node} --cpus-per-task=1 "
        "--gpus-per-node=0 --mem=4000 --time=10"
    )


def why_no_cluster() -> str | None:
    """What this machine lacks for a cluster of its own, if anything."""
    if os.geteuid() != 0:
        return "a Slurm cluster on one machine needs root"
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"{', '.join(absent)} not installed"
    namespaces = ["unshare", "--pid", "--mount", "--uts", "--fork", "true"]
    if subprocess.run(namespaces, capture_output=True, check=False).returncode:
        return "this machine does not allow namespaces of processes and mounts"
    return None


def free_ports(count: int) -> int:
    """The first of `count` ports in a row that nobody listens on."""
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
