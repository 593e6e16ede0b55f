"""Slurm's own commands: submission and state of jobs. No accounting is needed.

Arguments are passed as lists, never through a shell.
"""

import logging
import os
import re
import shlex
import subprocess
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field

from data_pipeline.errors import LaunchError

_LOG = logging.getLogger("megaback.slurm")
_OVER = frozenset(
    (
        *("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY"),
        *("BOOT_FAIL", "DEADLINE", "PREEMPTED", "REVOKED"),
    )
)
_NO_CONTROLLER = (
    "dns srv lookup failed",
    "could not establish a configuration source",
    "unable to contact slurm controller",
)
"""Messages of Slurm's commands if no controller answers."""
_JOB_ID = re.compile(r"[0-9][0-9A-Za-z_+.,%\[\]-]*")
_TIME = re.compile(r"(?:(\d+)-)?(\d+):(\d\d):(\d\d)")


@dataclass(frozen=True, kw_only=True)
class Submission:
    """A call of sbatch: variables for the job, options, the file and its arguments."""

    stage: str
    variables: Mapping[str, str]
    options: tuple[str, ...]
    file: str
    arguments: tuple[str, ...] = ()

    @property
    def command(self) -> list[str]:
        return ["sbatch", *self.options, self.file, *self.arguments]

    @property
    def line(self) -> str:
        """The command line, as a user types it."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in self.variables.items()]
        return " ".join([*variables, shlex.join(self.command)])


@dataclass(frozen=True)
class Job:
    """Slurm's state of a job, or of all elements of an array together."""

    job: str
    state: str
    restarts: int = 0
    reason: str | None = None
    """Reason why it is pending."""
    nodes: str | None = None
    left_s: int | None = None
    """Seconds until its time limit, while it runs."""
    excluded: tuple[str, ...] = ()
    """Nodes, or ranges of them, that it must not run on."""
    elements: Mapping[str, int] = field(default_factory=dict)
    """Number of elements of an array in each state."""

    @property
    def is_over(self) -> bool:
        return self.state in _OVER


def run_sbatch(submission: Submission, *more: str) -> str:
    """Call sbatch. Returns its output. Raises LaunchError with Slurm's reason."""
    words = submission.command
    command = [words[0], *more, *words[1:]]
    _LOG.debug("running %s", shlex.join(command))
    try:
        done = subprocess.run(
            command,
            env={**os.environ, **submission.variables},
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        raise LaunchError(
            "sbatch is not installed: this machine is not a login node of a Slurm cluster; log in "
            "to one, or train here with `megaback train`"
        ) from None
    reply = " ".join((done.stdout + done.stderr).split())
    if done.returncode and is_unreachable(reply):
        raise LaunchError(
            f"no Slurm controller can be reached by sbatch ({reply}); log in to a node of a "
            "running cluster, or train here with `megaback train`"
        )
    if done.returncode:
        raise LaunchError(f"Slurm refuses the {submission.stage} job: {reply}; {_advice(reply)}")
    return reply


def is_unreachable(reply: str) -> bool:
    """Whether a message of Slurm's commands means that no controller answers."""
    return any(sign in reply.lower() for sign in _NO_CONTROLLER)


def queue(submission: Submission) -> str:
    """Queue a job. Returns its id. Raises LaunchError."""
    return run_sbatch(submission, "--parsable").split()[-1].split(";")[0]


def cancel(job: str) -> None:
    """Cancel a job; has no effect if it has ended."""
    with suppress(FileNotFoundError):  # the caller reports its own error
        subprocess.run(["scancel", job], capture_output=True, check=False)


def find_job(job: str) -> Job | None:
    """Slurm's state of a job; None if it is unknown or forgotten, or Slurm is not installed.

    The records of a run may be untrusted: an id that is an option of scontrol is refused.
    """
    if _JOB_ID.fullmatch(job) is None:
        return None
    try:
        done = subprocess.run(
            ["scontrol", "--oneliner", "show", "job", job],
            capture_output=True,
            text=True,
            check=False,
        )
    except FileNotFoundError:
        return None
    return None if done.returncode else parse_job(job, done.stdout)


def parse_job(job: str, text: str) -> Job | None:
    """Parse `scontrol --oneliner show job`: a line per job or element of an array.

    The state of an array is that of an element that has not ended; else of one that failed.
    """
    records = [
        dict(word.split("=", 1) for word in line.split() if "=" in word)
        for line in text.splitlines()
        if "JobState=" in line
    ]
    if not records:
        return None
    states = [record["JobState"] for record in records]
    first = min(
        records, key=lambda record: (record["JobState"] in _OVER, record["JobState"] == "COMPLETED")
    )
    state, is_running = first["JobState"], first["JobState"] == "RUNNING"
    limit_s, run_s = (_seconds(first.get(name, "")) for name in ("TimeLimit", "RunTime"))
    left_s = None
    if is_running and limit_s is not None and run_s is not None:
        left_s = max(limit_s - run_s, 0)
    return Job(
        job=job,
        state=state,
        restarts=max(int(record.get("Restarts", 0)) for record in records),
        reason=first.get("Reason") if state == "PENDING" else None,
        nodes=first.get("NodeList") if is_running else None,
        left_s=left_s,
        excluded=_node_ranges(first.get("ExcNodeList", "(null)")),
        elements={name: states.count(name) for name in sorted(set(states))}
        if "ArrayJobId" in first and "_" not in job
        else {},
    )


def _node_ranges(text: str) -> tuple[str, ...]:
    """Slurm's list of nodes, split: `n[1-2,7],login` is `n[1-2,7]` and `login`."""
    return () if text == "(null)" else tuple(re.findall(r"(?:[^,\[]|\[[^\]]*\])+", text))


def _seconds(text: str) -> int | None:
    match = _TIME.fullmatch(text)
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _advice(reply: str) -> str:
    hints = {
        "account": "give --account, or export SBATCH_ACCOUNT",
        "partition": "`sinfo` lists the partitions; give --partition",
        "node configuration is not available": "`sinfo -o '%P %D %c %m %G'` shows what the nodes "
        "have; ask for fewer --nodes or --devices-per-node, or less memory",
        "time limit": "give a shorter --time (`sinfo -o '%P %l'` shows the limits)",
        "array": "give fewer tasks or runs (`scontrol show config` has MaxArraySize)",
    }
    found = [advice for sign, advice in hints.items() if sign in reply.lower()]
    return found[0] if found else "correct the option that it names"
