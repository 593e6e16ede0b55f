"""Cost of the loader in a training step, relative to the same batches already in memory.

    python benchmarks/loader_in_training.py SHARDS [--config configs/demo.yaml] [--data-threads 1]

Ranks on this machine's CPU, as `megaback train` starts them, train the config's model on SHARDS. In
turns, a block of steps takes its batches from the loader and a block takes the same ones from
memory, in alternating order. The first steps of a block are excluded: the loader's threads then
still prepare batches for the previous block. Time, CPU time (all threads of rank 0) and the time
that a step waits for its batch are medians over steps; the ratio is the median over pairs of steps
with equal batches.
"""

import json
import socket
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
from smoke import Benchmark

from data_pipeline.loading.rows import Batch
from data_pipeline.shards.data_set import DataSet
from launcher.ranks.local import rank_environment
from megaback.config import Config
from megaback.config_file import load_config

_LEFT_OUT_STEPS = 3


@dataclass(frozen=True)
class StepTime:
    """One step of rank 0, in seconds."""

    wall_s: float
    cpu_s: float
    waiting_s: float


class InMemory:
    """Precomputed batches with the interface of TrainingLoader."""

    def __init__(self, batches: dict[int, list[Batch]]) -> None:
        self._batches = batches

    def at(self, step: int) -> list[Batch]:
        return self._batches[step]


class Timed:
    """Batches of another iterator, with the wait for the latest ones."""

    def __init__(self, batches: object) -> None:
        self._batches = batches
        self.waited_s = 0.0

    def at(self, step: int) -> list[Batch]:
        started = time.perf_counter()
        found: list[Batch] = self._batches.at(step)  # type: ignore[attr-defined]
        self.waited_s = time.perf_counter() - started
        return found


def train_as_rank(config: Config, pairs: int, block_steps: int) -> None:
    """Train as the rank given by the environment; rank 0 prints."""
    from megaback.data import open_data
    from megaback.distributed.engine import set_learning_rates, take_step
    from megaback.distributed.world import end_rank, start_world
    from megaback.faults.stop_request import StopRequest
    from megaback.faults.watchdog import Watchdog
    from megaback.optim.lr_schedule import rate_factor_at
    from megaback.training.agreement import StepAhead
    from megaback.training.run import Run
    from megaback.training.setup import prepare_run
    from megaback.training.trainer import Trainer

    stop = StopRequest()
    world = start_world(config.hardware.device, config.hardware.collective_timeout_s)
    run = prepare_run(config, world, Watchdog(config.run, config.hardware, world))
    assert isinstance(run, Run)  # a new folder has steps left
    trainer = Trainer(run, world, stop)
    section = config.data.model_copy(update={"threads": 0})
    copies = open_data(config.model_copy(update={"data": section}), world.rank, world.size)
    run.engine.train()
    done_steps = 0

    def timed_block(batches: object, first_step: int) -> list[StepTime]:
        nonlocal done_steps
        source = Timed(batches)
        data = replace(run.data, training=source)  # type: ignore[arg-type]
        trainer._run = replace(run, data=data)
        ahead = trainer._ahead = StepAhead(trainer._run, world, stop, trainer._checkpoints)
        times = []
        world.barrier()
        for step in range(first_step, first_step + block_steps):
            started, cpu_started = time.perf_counter(), time.process_time()
            ahead.read(step)
            ahead.begin(None)
            micro_batches, agreed = ahead.take()
            trainer._accumulate_gradients(step, micro_batches, agreed.num_targets)
            factor = rate_factor_at(done_steps, run.data.total_steps, config.optimizer)
            set_learning_rates(run.engine, factor)
            take_step(run.engine, lambda _norm: None)
            ahead.nats()
            times.append(
                StepTime(
                    time.perf_counter() - started,
                    time.process_time() - cpu_started,
                    source.waited_s,
                )
            )
            done_steps += 1
        return times[_LEFT_OUT_STEPS:]

    timed_block(run.data.training, 0)
    loaded: list[StepTime] = []
    held: list[StepTime] = []
    for pair in range(pairs):
        first_step = (1 + pair) * block_steps
        steps = range(first_step, first_step + block_steps)
        memory = InMemory({step: copies.training.at(step) for step in steps})
        if pair % 2:
            held += timed_block(memory, first_step)
            loaded += timed_block(run.data.training, first_step)
        else:
            loaded += timed_block(run.data.training, first_step)
            held += timed_block(memory, first_step)
    run.data.training.close()
    if world.is_first:
        report(run.num_parameters, config, world.size, loaded, held)
    end_rank()


def report(
    num_parameters: int, config: Config, ranks: int, loaded: list[StepTime], held: list[StepTime]
) -> None:
    batch = config.batch
    click.echo(
        f"{num_parameters:,} parameters, {ranks} ranks, steps of {batch.global_batch_rows} x "
        f"{batch.context_tokens} tokens, data.threads {config.data.threads}: "
        f"{len(loaded)} steps each"
    )
    for title, times in (("loader", loaded), ("memory", held)):
        wall_ms = statistics.median(one.wall_s for one in times) * 1e3
        cpu_ms = statistics.median(one.cpu_s for one in times) * 1e3
        waiting = sum(one.waiting_s for one in times) / sum(one.wall_s for one in times)
        slowest_ms = max(one.waiting_s for one in times) * 1e3
        click.echo(
            f"{title}: {wall_ms:7.2f} ms per step, {cpu_ms:7.2f} ms of CPU; waits for batches "
            f"{waiting:.4%} of the time, at most {slowest_ms:.2f} ms"
        )
    both = list(zip(loaded, held, strict=True))
    ratios = [one.wall_s / other.wall_s for one, other in both]
    cpu_ratios = [one.cpu_s / other.cpu_s for one, other in both]
    low, middle, high = statistics.quantiles(ratios, n=4)
    click.echo(
        f"loader / memory: {middle:.4f} (quartiles {low:.4f} and {high:.4f}), "
        f"in CPU time {statistics.median(cpu_ratios):.4f}"
    )


def start_ranks(words: list[str], processes: int) -> int:
    """Run this file once per rank; returns the largest exit code."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {
        **rank_environment(processes),
        "WORLD_SIZE": str(processes),
        "LOCAL_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, *words],
            env={**common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(processes)
    ]
    return max(abs(rank.wait()) for rank in ranks)


@click.command(
    cls=Benchmark, smoke="{shards} --config {config} --processes 1 --pairs 2 --block-steps 5"
)
@click.argument("shards")
@click.option("--config", default="configs/demo.yaml", show_default=True, help="Config file.")
@click.option("--processes", default=2, show_default=True, help="Number of processes.")
@click.option("--data-threads", default=1, show_default=True, help="Loader threads per rank.")
@click.option("--pairs", default=12, show_default=True, help="Pairs of blocks of steps.")
@click.option("--block-steps", default=13, show_default=True, help="Steps per block.")
@click.option("--rank-config", hidden=True, help="Config file of the ranks.")
def main(
    shards: str,
    config: str,
    processes: int,
    data_threads: int,
    pairs: int,
    block_steps: int,
    rank_config: str | None,
) -> None:
    """Print the time of a step with batches from the loader and from memory, and their ratio."""
    if rank_config is not None:
        train_as_rank(Config.model_validate(json.loads(rank_config)), pairs, block_steps)
        return
    with TemporaryDirectory() as folder:
        direction = DataSet.open(shards).manifest.text_format.direction
        settings = load_config(
            Path(config),
            (
                f"run={folder}/run",
                f"data.shards={Path(shards).resolve() if Path(shards).exists() else shards}",
                f"data.direction={direction.value}",
                f"data.threads={data_threads}",
                f"hardware.processes={processes}",
                "hardware.device=cpu",
            ),
        )
        words = [shards, "--pairs", str(pairs), "--block-steps", str(block_steps)]
        words += ["--rank-config", settings.model_dump_json()]
        code = start_ranks(words, processes)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    main()
