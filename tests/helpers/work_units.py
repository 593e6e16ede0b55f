"""Units of work of parallel test processes (`pytest -n 2`).

A unit is a file, so that its fixtures are made once and its tests keep their order; or all tests of
a Slurm cluster, which is started once; or the files that share finished runs and ranks that stay
warm. Units are assigned in the order of collection: files of real processes, which take minutes,
are first, and short ones fill the gaps at the end.
"""

from typing import Any

from xdist.scheduler import LoadScopeScheduling

_TOGETHER = {
    "tests/cluster/": "a cluster",
    **{
        f"tests/integration/test_{name}.py": "finished runs"
        for name in (
            "branches",
            "fine_tuning",
            "fp32_weights",
            "horizons",
            "infill_command",
            "inspect",
            "interruption",
            "measurements",
            "next_commands",
            "parity",
            "shipped_configs",
            "training",
        )
    },
}


def unit_of(test_id: str) -> str:
    """The unit that a test belongs to."""
    path = test_id.split("::")[0]
    return next((unit for start, unit in _TOGETHER.items() if path.startswith(start)), path)


class WorkUnits(LoadScopeScheduling):
    """Assigns the next unit to the process that has almost finished its last one."""

    def __init__(self, config: Any, log: Any) -> None:
        config.option.loadscopereorder = False
        super().__init__(config, log)

    def _split_scope(self, nodeid: str) -> str:
        return unit_of(nodeid)
