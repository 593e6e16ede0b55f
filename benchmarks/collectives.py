"""Number and MB of a step's collectives: counted by `megaback rehearse`, beside the plan.

    python benchmarks/collectives.py [--shards DIR] [--only 3-muon]

Rank 40 of 64 with 8 ranks per node, 2 layers of width 512, bf16, with sharding over all ranks and
by node (`zero.hierarchical`), at ZeRO 1 to 3, with AdamW and Muon, and 2 and 8 micro-batches per
step. It prints a Markdown table, and fails if a number is not the planned one, or bytes differ from
the plan by more than 0.1%. Without --shards, they are built from `pydocs`.
"""

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

import click
from rehearsals import FEW_BYTES, build_shards
from smoke import Benchmark

from launcher.rehearse import planned_bytes
from megaback.config import Config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import cpu_device
from megaback.planning.plan import plan_run
from megaback.planning.run_settings import Cluster
from megaback.rehearsal.job import Job, RehearsalProcess, rehearsal_config
from megaback.rehearsal.report import RankFailure, RankReport

_NODES, _RANKS_PER_NODE, _RANK = 8, 8, 40
_RANKS = _NODES * _RANKS_PER_NODE
_MAX_DIFFERENCE = 1e-3
_PLACES = ("node", "engine")


@dataclass(frozen=True)
class Cell:
    """A row of the table."""

    stage: int
    optimizer: str
    micro_batches: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.optimizer}-{self.micro_batches}"

    def config(self, shards: Path, *, is_hierarchical: bool) -> Config:
        rows = _RANKS * self.micro_batches
        config = Config.model_validate(
            {
                "run": "unused",
                "data": {"shards": str(shards)},
                "model": {"num_layers": 2, "width": 512, "num_heads": 4},
                "batch": {"context_tokens": 64, "global_batch_rows": rows, "micro_batch_rows": 1},
                "optimizer": {"name": self.optimizer, "learning_rate": 1e-3},
                "training": {"steps": 100, "precision": "bf16"},
                "zero": {"stage": self.stage, "hierarchical": is_hierarchical},
            }
        )
        return rehearsal_config(config, 2, None)


def report_of(process: RehearsalProcess, config: Config) -> RankReport:
    """Raises the error of a rank that fails."""
    (found,) = process.rehearse(Job(config, (_RANK,), _RANKS, _RANKS_PER_NODE, True))
    if isinstance(found, RankFailure):
        raise found.error
    return found


def texts(cell: Cell, config: Config, report: RankReport) -> Iterator[str]:
    """Calls and MB, within a node and of all others. Raises SystemExit if they are not planned."""
    cluster = Cluster(_NODES, _RANKS_PER_NODE, cpu_device(1.0, None))
    plan = plan_run(config, run_facts(config, None, None), cluster, rank=_RANK)
    counted = {
        (one.group, one.kind): (one.calls, one.sent_bytes)
        for one in report.traffic
        if one.group != "control"
    }
    calls, planned = plan.calls.by_group(plan.traffic), planned_bytes(plan)
    if calls != {key: number for key, (number, _) in counted.items()}:
        raise SystemExit(f"{cell.name}: {counted}, and {calls} are planned")
    for key, (_, sent_bytes) in counted.items():
        difference = abs(planned.get(key, 0.0) - sent_bytes)
        if difference > max(_MAX_DIFFERENCE * sent_bytes, FEW_BYTES):
            raise SystemExit(f"{cell.name}: {key} sent {sent_bytes} bytes, planned {planned}")
    for place in _PLACES:
        of_place = [one for (group, _), one in counted.items() if group == place]
        number, sent = (sum(column) for column in zip((0, 0), *of_place, strict=True))
        yield f"{number}, {sent / 1e6:.1f}" if number else ""


@click.command(cls=Benchmark, smoke="--shards {shards} --only 1-adamw-2")
@click.option("--shards", type=click.Path(path_type=Path), help="Data set of the runs.")
@click.option("--only", default="", help="Start of a row: stage, optimizer and micro-batches.")
def main(shards: Path | None, only: str) -> None:
    """Rehearse a rank with each setting, and print a table."""
    click.echo("| ZeRO | optimizer | micro-batches | all ranks | by node: within | between |")
    click.echo("|---" * 6 + "|")
    cells = (Cell(*one) for one in product((1, 2, 3), ("adamw", "muon"), (2, 8)))
    with tempfile.TemporaryDirectory() as folder, RehearsalProcess() as process:
        shards = (shards or build_shards(Path(folder))).absolute()
        for cell in cells:
            if not cell.name.startswith(only):
                continue
            columns = []
            for is_hierarchical in (False, True):
                config = cell.config(shards, is_hierarchical=is_hierarchical)
                columns += texts(cell, config, report_of(process, config))
            found = " | ".join(columns[1:])  # no group of a node without hierarchy
            click.echo(f"| {cell.stage} | {cell.optimizer} | {cell.micro_batches} | {found} |")


if __name__ == "__main__":
    main()
