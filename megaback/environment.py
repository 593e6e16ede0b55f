"""Environment variables that the launcher or Slurm sets for a rank."""

import os

LAUNCHER_VARIABLE = "MEGABACK_LAUNCHER"
"""Process id of the launcher; a rank ends when that process does."""


HOST_VARIABLE = "MEGABACK_HOST"
"""Name of this node in the hostfile."""


def slurm_job() -> tuple[str | None, int]:
    """The Slurm job of this process, None outside of one, and how often it was restarted."""
    restarts = os.environ.get("SLURM_RESTART_COUNT", "0")
    return os.environ.get("SLURM_JOB_ID"), int(restarts) if restarts.isdecimal() else 0
