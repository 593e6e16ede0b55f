"""Memory per rank: predicted by `megaback plan`, and measured in real runs.

    python benchmarks/memory.py [--ranks 1,2] [--shards DIR] [--only adamw] [--json] [OVERRIDES]

Complete runs of two steps on 1 and 2 processes of this machine: every ZeRO stage, fp32 and bf16,
every kind of activation checkpointing, AdamW and Muon. Measured is the peak resident memory (VmHWM
of Linux) of the rank that has the most, minus its memory before the run: until the checkpoint is
written, and including it. glibc is set to return every freed block above 64 KiB, so the measured
memory is the allocated memory. Without --shards, they are built from `pydocs`. OVERRIDES of the
config, such as zero.reduce_once=true, hold for all cases. With init_from=BASE among them, the model
is the base's; finetune.lora.rank is for the cases of --only adamw. The memory of oneDNN's kernels
for bf16, which is not counted, is smallest with ONEDNN_MAX_CPU_ISA=AVX2.
"""

import ctypes
import gc
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import click
import yaml
from smoke import Benchmark

from launcher.ranks.local import rank_environment, rank_names
from megaback.config import Config
from megaback.config_file import load_config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import cpu_device
from megaback.planning.memory import RankMemory
from megaback.planning.plan import memory_of
from megaback.planning.run_settings import Cluster

_MALLOC = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_ARENA_MAX": "1",
}
_RUNS_A_PROCESS = 8
"""Maximum runs per process, because memory of finished runs adds up."""


@dataclass(frozen=True)
class Case:
    """A way of training."""

    ranks: int
    optimizer: str
    checkpointing: str
    precision: str
    stage: int

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.optimizer}-{self.checkpointing}-{self.precision}-{self.stage}"

    def overrides(self) -> list[str]:
        return [
            f"optimizer.name={self.optimizer}",
            f"training.activation_checkpointing={self.checkpointing}",
            f"training.precision={self.precision}",
            f"zero.stage={self.stage}",
        ]


def all_cases(ranks: list[int], only: str) -> list[Case]:
    ways = product(
        ranks,
        ("adamw", "muon"),
        ("none", "selective", "block"),
        ("fp32", "bf16"),
        (0, 1, 2, 3),
    )
    return [case for way in ways if only in (case := Case(*way)).name]


def config_fields(shards: Path, run: Path, *, has_base: bool) -> dict[str, Any]:
    """17 million parameters, or a base's; on one process, two micro-batches are accumulated."""
    model = {"num_layers": 6, "width": 384, "num_heads": 6}
    return {
        "run": str(run),
        "data": {"shards": str(shards)},
        **({} if has_base else {"model": model}),
        "batch": {"context_tokens": 512, "global_batch_rows": 2, "micro_batch_rows": 1},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 2, "precision": "fp32"},
        "hardware": {"device": "cpu", "preflight": "off"},
    }


def planned(config: Config, ranks: int) -> RankMemory:
    return memory_of(config, run_facts(config, None, None), Cluster(1, ranks, cpu_device(1, None)))


def status_bytes(name: str) -> int:
    text = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in text.splitlines() if line.startswith(name + ":"))
    return int(line.split()[1]) * 1024


def serve() -> None:
    """A rank: reads a line of overrides per run, and prints the run's peaks in bytes."""
    import torch
    import torch._dynamo  # as DeepSpeed does at stage 3

    from megaback.checkpoints import pipeline
    from megaback.checkpoints.saver import CheckpointSaver
    from megaback.distributed.world import end_rank, start_world
    from megaback.faults.stop_request import StopRequest
    from megaback.faults.watchdog import Watchdog
    from megaback.model.lora import require_peft
    from megaback.train import train_run

    answers, sys.stdout = sys.stdout, sys.stderr
    torch.set_num_threads(1)
    libc = ctypes.CDLL("libc.so.6")
    before_saving: list[int] = []

    class NotingSaver(CheckpointSaver):
        def begin(self, *arguments: Any, **named: Any) -> None:
            before_saving.append(status_bytes("VmHWM"))
            super().begin(*arguments, **named)

    pipeline.CheckpointSaver = NotingSaver  # type: ignore[misc]
    world = start_world("cpu", 300)
    for line in sys.stdin:
        path, overrides = json.loads(line)
        config = load_config(Path(path), tuple(overrides))
        if config.finetune.adapters is not None:
            require_peft()
        gc.collect()
        libc.malloc_trim(0)
        before_saving.clear()
        base = status_bytes("VmRSS")
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets VmHWM
        watchdog = Watchdog(config.run, config.hardware, world)
        train_run(config, world, StopRequest(None), watchdog)
        peaks = (before_saving[0] - base, status_bytes("VmHWM") - base)
        all_peaks = world.gather(peaks, tuple[int, int])
        if world.is_first:
            shutil.rmtree(config.run)
            print(
                json.dumps([max(part) for part in zip(*all_peaks, strict=True)]),
                file=answers,
                flush=True,
            )
        world.barrier()
    end_rank()


class Ranks:
    """Processes that execute runs, one after another."""

    def __init__(self, ranks: int, log: Path) -> None:
        environment = {**rank_environment(ranks), "OMP_NUM_THREADS": "1", **_MALLOC}
        self._log = log
        with log.open("w", encoding="utf-8") as output:
            self._ranks = [
                subprocess.Popen(
                    [sys.executable, __file__, "--serve"],
                    env=environment | names,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=output,
                    text=True,
                )
                for names in rank_names(ranks)
            ]

    def peaks(self, config: Path, overrides: list[str]) -> tuple[int, int]:
        """Peak memory of a run in bytes, without and with its checkpoint."""
        for rank in self._ranks:
            assert rank.stdin is not None
            rank.stdin.write(json.dumps([str(config), overrides]) + "\n")
            rank.stdin.flush()
        assert self._ranks[0].stdout is not None
        for line in self._ranks[0].stdout:
            if line.startswith("["):
                before, whole = json.loads(line)
                return before, whole
        raise SystemExit(f"a rank ended with {' '.join(overrides)}:\n{self._log.read_text()}")

    def close(self) -> None:
        for rank in self._ranks:
            rank.kill()
            rank.communicate()


def measure(
    cases: list[Case], config_path: Path, others: tuple[str, ...]
) -> Iterator[dict[str, Any]]:
    """Run every case; returns its planned and measured memory."""
    configs = [load_config(config_path, (*case.overrides(), *others)) for case in cases]
    small = ("model.num_layers=1", "model.width=64", "model.num_heads=2")
    started: Ranks | None = None
    last: tuple[int, str] | None = None
    num_runs = 0
    for case, config in zip(cases, configs, strict=True):
        if started is None or last != (case.ranks, case.optimizer) or num_runs == _RUNS_A_PROCESS:
            if started is not None:
                started.close()
            log = config_path.with_name("ranks.txt")
            started, num_runs, last = Ranks(case.ranks, log), 0, (case.ranks, case.optimizer)
            for precision in ("fp32", "bf16"):  # memory of libraries that are loaded once
                one = replace(case, precision=precision).overrides()
                started.peaks(config_path, [*one, *(small if config.init_from is None else others)])
        overrides = [*case.overrides(), *others]
        memory = planned(config, case.ranks)
        training = max(total for name, total in memory.moments.items() if name != "saving")
        before, whole = started.peaks(config_path, overrides)
        num_runs += 1
        yield {
            **asdict(case),
            "training_bytes": before,
            "planned_training_bytes": round(training),
            "whole_bytes": whole,
            "planned_whole_bytes": round(memory.parts.total),
            "moment": memory.moment,
        }
    if started is not None:
        started.close()


def build_shards(folder: Path) -> Path:
    tokenizer, shards = folder / "tokenizer", folder / "shards"
    model = tokenizer / "tokenizer.model"
    for line in (
        f"tokenizer train --source pydocs --out {tokenizer}",
        f"shards build --source pydocs --tokenizer {model} --out {shards} --val-fraction 0",
    ):
        command = [sys.executable, "-m", "megaback", *line.split()]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return shards


@click.command(
    cls=Benchmark,
    smoke="--ranks 1 --shards {shards_without_val} --only 1-muon-none-fp32-2 model.num_layers=1"
    " model.width=64 model.num_heads=1 batch.context_tokens=64",
)
@click.option("--ranks", default="1,2", show_default=True, help="Numbers of processes.")
@click.option("--shards", type=click.Path(path_type=Path), help="Shards without a val set.")
@click.option(
    "--only", default="", help="Part of the names of the cases to run, as in 2-muon-none-fp32-3."
)
@click.option("--json", "as_json", is_flag=True, help="Print a line of JSON per case.")
@click.option("--serve", "is_rank", is_flag=True, hidden=True)
@click.argument("overrides", nargs=-1)
def main(
    ranks: str,
    shards: Path | None,
    only: str,
    as_json: bool,
    is_rank: bool,
    overrides: tuple[str, ...],
) -> None:
    """Print planned and measured memory of every case, and the largest difference."""
    if is_rank:
        serve()
        return
    os.environ["PYTHONPATH"] = str(Path(__file__).parents[1])
    cases = all_cases([int(number) for number in ranks.split(",")], only)
    worst = 0.0
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = folder / "run.yaml"
        data, has_base = (shards or build_shards(folder)).absolute(), "init_from=" in str(overrides)
        fields = config_fields(data, folder / "run", has_base=has_base)
        path.write_text(yaml.safe_dump(fields), encoding="utf-8")
        for found in measure(cases, path, overrides):
            ratios = [
                found[f"planned_{name}_bytes"] / found[f"{name}_bytes"] - 1
                for name in ("training", "whole")
            ]
            worst = max(worst, *map(abs, ratios))
            if as_json:
                click.echo(json.dumps(found))
                continue
            click.echo(
                f"{found['ranks']} {found['optimizer']:5} {found['checkpointing']:9} "
                f"{found['precision']} ZeRO {found['stage']}  training "
                f"{found['planned_training_bytes'] / 1e6:4.0f} planned, "
                f"{found['training_bytes'] / 1e6:4.0f} MB measured, {ratios[0]:+.1%}; with the "
                f"checkpoint {found['planned_whole_bytes'] / 1e6:4.0f}, "
                f"{found['whole_bytes'] / 1e6:4.0f}, {ratios[1]:+.1%}"
            )
    if not as_json:
        click.echo(f"largest difference of {len(cases)} runs: {worst:.1%}")


if __name__ == "__main__":
    main()
