"""A rank in which nothing can be unpickled, that trains, saves and goes on at two ZeRO stages.

`python -m tests.helpers.sealed_rank CONFIG FOLDER`, with a rank's environment. The first rank
prints, as JSON, how each run ended; every rank writes where it listened to `FOLDER/listening-RANK`.
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
    """Asks to stop once a few steps are done."""

    def __init__(self, run: Path) -> None:
        super().__init__(None)
        self._metrics = run / "metrics.jsonl"

    @property
    def reason(self) -> str | None:
        return "asked" if self._metrics.exists() and self._metrics.stat().st_size else None


def refuse(*_arguments: Any, **_options: Any) -> Any:
    """Stands for whatever would execute what another rank has sent."""
    raise AssertionError("something was to be unpickled")


class Sealed(_pickle.Unpickler):
    """An unpickler, since libraries have subclasses of it, that reads nothing."""

    load = refuse


def seal() -> None:
    """From now on nothing can be unpickled, nor objects be sent by torch."""
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
    """Train until asked to stop, then to the end; the exit codes."""
    overrides = (f"run={run}", f"zero.stage={stage}", "training.steps=6", "hardware.preflight=on")
    settings = load_config(config, (*overrides, f"checkpoint.copy_to={run.with_name('copies')}"))
    codes: list[int | None] = []
    for stop in (StopAfter(run), StopRequest(None)):
        try:
            train_run(settings, world, stop, Watchdog(run, settings.hardware, world))
            world.barrier()  # the first rank writes how it ended
            ending = read_exit(run)
            codes.append(None if ending is None else ending["code"])
        except CollectiveExit as end:
            codes.append(int(end.code or 0))
        world.barrier()
    return codes


def listening() -> list[str]:
    """The addresses on which this process, and those that it started, wait for connections."""
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
        print(json.dumps(ended), file=answers)
    end_rank()


if __name__ == "__main__":
    main()
