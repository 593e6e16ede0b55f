"""Memory and traffic of single ranks of large runs: planned, and measured by `megaback rehearse`.

    python benchmarks/rehearsals.py OUT [--shards DIR] [--only reverse_1b] [OVERRIDES]
    python benchmarks/rehearsals.py OUT --table memory

The shipped configs of large models on 8 to 512 ranks, at ZeRO 1 to 3, with AdamW and Muon: one row
of 512 tokens per rank, and two layers of the largest models. With AdamW the last rank is rehearsed,
with Muon the first and, if there are any, the first one that owns no matrix; without arithmetic
(`--skip-arithmetic`). Each cell is appended to OUT, and cells that it contains are skipped, so that
an interrupted benchmark continues; several can run at once with different `--only`. `--table`
prints a table of OUT beside the plan. Without --shards, they are built from `pydocs`.
"""

import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from typing import Any

import click
from smoke import Benchmark

from data_pipeline.common.terminal import echo
from launcher.rehearse import planned_bytes, planned_memory, problems_between
from megaback.config import Config
from megaback.config_file import load_config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import cpu_device
from megaback.planning.plan import DEFAULT_MFU, RunPlan, plan_run
from megaback.planning.run_settings import Cluster
from megaback.rehearsal.job import Job, RehearsalProcess, rehearsal_config
from megaback.rehearsal.report import RankFailure, RankReport
from megaback.rehearsal.rows import check_rows

_CONFIGS = Path(__file__).parents[1] / "configs"
_LAYERS = {"xcoax_100bt": 12, "reverse_1b": 2, "reverse_2b": 2, "reverse_7b": 2}
"""Number of layers of each config's rehearsed model."""
_RANKS = (8, 64, 128, 256, 512)
_STAGES = (1, 2, 3)
_OPTIMIZERS = ("adamw", "muon")
_RANKS_PER_NODE = 8
_STEPS = 2
FEW_BYTES = 1_000
"""Bytes per step of norms and counters, which are not planned."""


@dataclass(frozen=True)
class Cell:
    """A run at a size, of which some ranks are rehearsed."""

    config: str
    optimizer: str
    stage: int
    ranks: int
    overrides: tuple[str, ...]

    @property
    def name(self) -> str:
        return f"{self.config}-{self.optimizer}-{self.stage}-{self.ranks}"

    def settings(self, shards: Path) -> Config:
        """Config of the rehearsed run."""
        overrides = (
            f"data.shards={shards}",
            f"optimizer.name={self.optimizer}",
            f"zero.stage={self.stage}",
            f"model.num_layers={_LAYERS[self.config]}",
            "batch.context_tokens=512",
            f"batch.global_batch_rows={self.ranks}",
            "batch.micro_batch_rows=1",
            *self.overrides,
        )
        path = _CONFIGS / f"{self.config}.yaml"
        return rehearsal_config(load_config(path, overrides), _STEPS, None)

    def plan(self, config: Config, vocab_size: int | None, rank: int) -> RunPlan:
        nodes = self.ranks // _RANKS_PER_NODE
        cluster = Cluster(nodes, _RANKS_PER_NODE, cpu_device(1.0, None))
        facts = run_facts(config, vocab_size, None)
        return plan_run(config, facts, cluster, DEFAULT_MFU, rank)


def all_cells(ranks: list[int], only: str, overrides: tuple[str, ...]) -> list[Cell]:
    ways = product(ranks, _LAYERS, _OPTIMIZERS, _STAGES)
    cells = [Cell(name, optimizer, stage, size, overrides) for size, name, optimizer, stage in ways]
    return [cell for cell in cells if only in cell.name]


def rehearse(process: RehearsalProcess, cell: Cell, config: Config) -> Iterator[RankReport]:
    """Rehearse the cell's ranks. Raises the error of a rank that fails."""

    def report_of(rank: int) -> RankReport:
        job = Job(config, (rank,), cell.ranks, _RANKS_PER_NODE, skip_arithmetic=True)
        (found,) = process.rehearse(job)
        if isinstance(found, RankFailure):
            raise found.error
        return found

    first = report_of(0 if cell.optimizer == "muon" else cell.ranks - 1)
    yield first
    without = first.ownership.first_without_matrices
    if without is not None:
        yield report_of(without)


def done_cells(out: Path) -> dict[str, dict[str, Any]]:
    if not out.exists():
        return {}
    found = [json.loads(line) for line in out.read_text(encoding="utf-8").splitlines()]
    return {one["name"]: one for one in found}


def build_shards(folder: Path) -> Path:
    """Build shards of `pydocs` with the default vocabulary."""
    from data_pipeline.build.command import build_shards as build
    from data_pipeline.build.settings import BuildSettings
    from data_pipeline.sources.weighted import WeightedSource
    from data_pipeline.text.codec import Direction, TextCodec, Unit
    from data_pipeline.text.tokenizer import TOKENIZER_NAME
    from data_pipeline.tokenizer.train_tokenizer import train_tokenizer

    train_tokenizer("pydocs", folder / "tokenizer")
    path = folder / "tokenizer" / TOKENIZER_NAME
    codec = TextCodec.load(path, Direction.BACKWARD, Unit.TOKEN)
    settings = BuildSettings(
        sources=(WeightedSource("pydocs"),), tokenizer_sha256=codec.format.tokenizer_sha256
    )
    build(settings, codec, folder / "shards", workers=1)
    return folder / "shards"


Comparison = tuple[float, float | None]
"""A measured value, and the relative difference of the plan from it."""


def compare(found: dict[str, Any], kind: str) -> Comparison:
    """Measurement of a cell's rank whose plan differs most from it, for a kind of table."""
    names = ("config", "optimizer", "stage", "ranks", "overrides")
    cell = Cell(*(found[name] for name in names))
    pairs = []
    for report in found["reports"]:
        if kind == "step":
            pairs.append((report["step_cpu_s"] * 1e3, None))
            continue
        plan = cell.plan(cell.settings(Path("none")), found["vocab_size"], report["rank"])
        pairs.append(sent(report, plan) if kind == "sent" else memory(report, plan, kind))
    return max(pairs, key=lambda pair: abs(pair[1] or 0.0))


def memory(report: dict[str, Any], plan: RunPlan, kind: str) -> Comparison:
    """Peak memory in MB: while training, or with the start."""
    moments = ("start", "training") if kind == "memory" else ("training",)
    planned = planned_memory(plan)
    measured = max(report[f"memory_{moment}_bytes"] for moment in moments)
    return measured / 1e6, max(planned[moment] for moment in moments) / measured - 1


def sent(report: dict[str, Any], plan: RunPlan) -> Comparison:
    """Sum of the MB sent, and the difference of the kind of collective whose plan is worst."""
    planned = planned_bytes(plan)
    measured = {
        (one["group"], one["kind"]): one["sent_bytes"]
        for one in report["traffic"]
        if one["group"] != "control"
    }
    differences = [
        (planned.get(key, 0.0) - measured.get(key, 0)) / max(measured.get(key, 0), 1)
        for key in planned | measured
        if planned.get(key, 0.0) + measured.get(key, 0) > FEW_BYTES
    ]
    return sum(measured.values()) / 1e6, max(differences, key=abs)


@click.command(
    cls=Benchmark,
    smoke="{out} --shards {shards} --ranks 8 --only xcoax_100bt-muon-3 model.num_layers=1 "
    "model.width=64 model.num_heads=1 batch.context_tokens=64",
)
@click.argument("out", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option("--shards", type=click.Path(path_type=Path), help="Data set of the runs.")
@click.option("--ranks", default="8,64,128,256,512", show_default=True, help="Numbers of ranks.")
@click.option("--only", default="", help="Part of the names of the cells to measure.")
@click.option(
    "--table", type=click.Choice(["memory", "training", "sent", "step"]), help="Table of OUT."
)
def main(
    out: Path,
    overrides: tuple[str, ...],
    shards: Path | None,
    ranks: str,
    only: str,
    table: str | None,
) -> None:
    """Rehearse cells that OUT does not contain yet, and append them; or print a table of OUT."""
    if table is not None:
        print_table(done_cells(out), table)
        return
    cells = all_cells([int(number) for number in ranks.split(",")], only, overrides)
    with tempfile.TemporaryDirectory() as folder, RehearsalProcess() as process:
        shards = (shards or build_shards(Path(folder))).absolute()
        for cell in cells:
            if cell.name in done_cells(out):
                continue
            config = cell.settings(shards)
            vocab_size = run_facts(config, None, None).vocab_size
            rows = check_rows(config, cell.ranks, _STEPS)
            reports = list(rehearse(process, cell, config))
            for problem in (*rows.problems, *problems_between(reports)):
                raise SystemExit(f"{cell.name}: {problem}")
            found = {
                "name": cell.name,
                **asdict(cell),
                "vocab_size": vocab_size,
                "reports": [asdict(one) for one in reports],
            }
            with out.open("a", encoding="utf-8") as file:
                file.write(json.dumps(found) + "\n")
            measured, difference = compare(found, "training")
            echo(f"{cell.name} {measured:,.0f} MB while training, planned {difference:+.1%}")


def print_table(found: dict[str, dict[str, Any]], kind: str) -> None:
    """Print a Markdown table: measured values, and the difference of the plan from them."""
    sizes = sorted({int(one["ranks"]) for one in found.values()})
    click.echo(f"| config | optimizer | ZeRO | {' | '.join(map(str, sizes))} |")
    click.echo("|---" * (3 + len(sizes)) + "|")
    worst = 0.0
    for config, optimizer, stage in product(_LAYERS, _OPTIMIZERS, _STAGES):
        texts = []
        for size in sizes:
            one = found.get(f"{config}-{optimizer}-{stage}-{size}")
            if one is None:
                texts.append("")
                continue
            measured, difference = compare(one, kind)
            worst = max(worst, abs(difference or 0.0))
            texts.append(f"{measured:,.0f}" + ("" if difference is None else f" {difference:+.1%}"))
        if any(texts):
            click.echo(f"| {config} | {optimizer} | {stage} | {' | '.join(texts)} |")
    click.echo(f"\n{len(found)} cells; largest difference {worst:.2%}")


if __name__ == "__main__":
    main()
