"""A rank that runs preflight repeatedly, each time with another fault in one rank.

`python -m tests.helpers.preflight_rank CONFIG RUN`, with a rank's environment. Faults are injected
here, by name; each result of preflight is in `RUN-NAME` and, for the first rank, on stdout as JSON.
"""

import json
import os
import sys
import threading
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from data_pipeline.common.logging_setup import set_up_logging
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.distributed import links
from megaback.distributed.world import CollectiveExit, World, end_rank, start_world
from megaback.environment import HOST_VARIABLE
from megaback.faults import node_facts, preflight, shared_disk

BAD_RANK = 1
EVERYWHERE = {"full disk"}
"""Faults of all ranks."""
_TRUE = {
    "versions": node_facts.versions,
    "multiply": node_facts.multiply,
    "wall_clock": preflight.wall_clock,
    "_path": shared_disk._path,
    "exchange": links.exchange,
}


def _slow(*arguments: Any) -> Any:
    """Compute ten products where one is timed."""
    for _ in range(10):
        product = _TRUE["multiply"](*arguments)
    return product


def _connect_late(*operations: Any) -> None:
    """Connect after the timeout."""
    time.sleep(0.5)
    _TRUE["exchange"](*operations)


FAULTS: dict[str, tuple[Any, str, Any]] = {
    "other version": (node_facts, "versions", lambda: _TRUE["versions"]() | {"torch": "1.0"}),
    "wrong device": (node_facts, "multiply", lambda *a: _TRUE["multiply"](*a) * 1.01),
    "slow": (node_facts, "multiply", _slow),
    "skewed": (preflight, "wall_clock", lambda: _TRUE["wall_clock"]() + 300),
    "broken link": (links, "exchange", _connect_late),
    "full disk": (shared_disk, "_path", lambda *_: Path("/dev/full")),
    "own disk": (shared_disk, "_path", lambda run, n: _TRUE["_path"](run.with_name("own"), n)),
}


def check(name: str, wanted: str, config: Path, run: Path, world: World) -> dict[str, Any]:
    """Run preflight with a fault in one rank. Returns its result."""
    settings = load_config(config, (f"run={run}", f"hardware.preflight={wanted}"))
    run.mkdir(exist_ok=True)
    (run.with_name("own") / ".preflight").mkdir(parents=True, exist_ok=True)
    data = open_data(settings, world.rank, world.size)
    world.barrier()
    ending: dict[str, Any] = {"code": 0, "sentence": ""}
    with ExitStack() as stack:
        if name in FAULTS and (world.rank == BAD_RANK or name in EVERYWHERE):
            stack.enter_context(patch.object(*FAULTS[name]))
        stack.enter_context(patch.object(shared_disk, "_TIMEOUT_S", 0.2))
        if name == "broken link":
            stack.enter_context(patch.object(links, "TIMEOUT_S", 0.1))
        try:
            preflight.preflight(settings, data, world)
        except CollectiveExit as end:
            ending = {"code": end.code, "sentence": str(end.error)}
        for thread in threading.enumerate():
            if thread.name == "links":
                thread.join()
    return ending


def main() -> None:
    """Run preflight with each of the requested faults."""
    config, folder, cases = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    os.environ[HOST_VARIABLE] = f"node{os.environ['RANK']}"
    set_up_logging()
    world = start_world("cpu", 60)
    endings = [
        check(name, wanted, config, folder / f"{name} {wanted}", world) for name, wanted in cases
    ]
    if world.is_first:
        print(json.dumps(endings))
    end_rank()


if __name__ == "__main__":
    main()
