"""Slurm's notation of nodes (`gpu-a[001-002,7],login-b`), read without Slurm.

In a container within a job step, SLURM_STEP_NODELIST is there and scontrol mostly is not.
"""

import re

from data_pipeline.errors import LaunchError

_RANGES = r"\[(\d+)(?:-\d+)?(?:,\d+(?:-\d+)?)*\]"
_FIRST = re.compile(rf"((?:[^\[\],\s]|{_RANGES})+)(?:,|$)")


def first_node(nodes: str) -> str:
    """The node that `scontrol show hostnames` lists first. Raises LaunchError."""
    found = _FIRST.match(nodes)
    if found is None:
        raise LaunchError(
            f"SLURM_STEP_NODELIST is {nodes!r}, which is no list of nodes in Slurm's notation; "
            "set MASTER_ADDR to the first node"
        )
    return re.sub(_RANGES, r"\1", found[1])
