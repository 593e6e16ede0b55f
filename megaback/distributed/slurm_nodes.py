"""Parsing of Slurm's node lists (`gpu-a[001-002,7],login-b`) without Slurm.

A container within a job step has SLURM_STEP_NODELIST, but often no scontrol.
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
            f"SLURM_STEP_NODELIST is {nodes!r}, which is not a list of nodes in Slurm's notation; "
            "set MASTER_ADDR to the first node"
        )
    return re.sub(_RANGES, r"\1", found[1])
