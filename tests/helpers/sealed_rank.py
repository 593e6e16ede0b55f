"""A rank that trains, saves and resumes at two ZeRO stages with unpickling disabled.

`python -m tests.helpers.sealed_rank CONFIG FOLDER`, with a rank's environment. The first rank
prints the exit codes of each run as JSON; every rank writes the addresses that it listens on to
`FOLDER/listening-RANK`.
"""

import _pickle
import json
import pickle
import sys
from pathlib import Path
from typing import Any

import psutil
import torch
import torch.distributed as dist

from data_pipeline.errors import PreemptedError
from megaback.config_file import load_config
from megaback.distributed.world import CollectiveExit, World, end_rank, start_world
from megaback.faults.exit_record import read_exit
from megaback.faults.stop_request import StopRequest
from megaback.faults.watchdog import Watchdog
from megaback.train import train_run

STAGES = (2, 3)


class StopAfter(StopRequest):
    """Requests a stop after a few steps."""

    def __init__(self, run: Path) -> None:
        super().__init__(None)
        self._metrics = run / "metrics.jsonl"

    @property
    def reason(self) -> str | None:
        return "asked" if self._metrics.exists() and self._metrics.stat().st_size else None


def refuse(*_arguments: Any, **_options: Any) -> Any:
    """Replacement for functions that could execute data of another rank."""
    raise AssertionError("unpickling was attempted")


class Sealed(_pickle.Unpickler):
    """An unpickler that always fails; a class, as libraries subclass it."""

    load = refuse


def seal() -> None:
    """Disable unpickling, and torch's sending of objects, from now on."""
    for module in (pickle, _pickle):
        module.load = module.loads = refuse  # type: ignore[assignment]
        module.Unpickler = Sealed  # type: ignore[misc]
    c10d = dist.distributed_c10d
    c10d._unpickler = Sealed
    for name in (*dir(dist), *dir(c10d)):
        if "object" in name:
            for module in (dist, c10d):
                setattr(module, name, refuse)
    torch.load = refuse


def train(config: Path, run: Path, stage: int, world: World) -> list[int | None]:
    """Train until a stop request, then to the end. Returns the exit codes."""
    overrides = (f"run={run}", f"zero.stage={stage}", "training.steps=6", "hardware.preflight=on")
    settings = load_config(config, (*overrides, f"checkpoint.copy_to={run.with_name('copies')}"))
    codes: list[int | None] = []
    for stop in (StopAfter(run), StopRequest(None)):
        try:
            train_run(settings, world, stop, Watchdog(run, settings.hardware, world))
            world.barrier()  # the first rank writes the exit record
            ending = read_exit(run)
            codes.append(None if ending is None else ending["code"])
        except CollectiveExit as end:
            codes.append(int(end.code or 0))
        world.barrier()
    return codes


def listening() -> list[str]:
    """The addresses on which this process and its children listen."""
    own = psutil.Process()
    return [
        connection.laddr.ip
        for process in (own, *own.children(recursive=True))
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]


def main() -> None:
    """Train at each stage."""
    config, folder = Path(sys.argv[1]), Path(sys.argv[2])
    seal()
    world = start_world("cpu", 60)
    answers, sys.stdout = sys.stdout, sys.stderr
    ended = {stage: train(config, folder / f"stage-{stage}", stage, world) for stage in STAGES}
    assert all(codes == [PreemptedError.exit_code, 0] for codes in ended.values()), ended
    (folder / f"listening-{world.rank}").write_text("\n".join(listening()))
    if world.is_first:
        print(json.dumps(ended), file=answers, flush=True)
    end_rank()


if __name__ == "__main__":
    main()
