"""Time that a training step waits for what the ranks agree on, with a slow network.

    python benchmarks/control.py SHARDS [--latency-ms 40] [--compute-ms 30,45,60,120]

Ranks on this machine's CPU train a tiny model. Each all-reduce arrives `--latency-ms` after it was
started: one that is not asynchronous blocks for that time, and the others travel meanwhile. A step
computes by sleeping `--compute-ms`, a third in the forward and two thirds in the backward pass, as
if a device did. Measured is how long rank 0 is blocked by all-reduces of numbers of 64 bits, which
are those of the control messages and of the loss; gradients have 32. In the first table only these
are delayed, in the second gradients too, as they would be in the same network.
"""

import os
import statistics
import time
from itertools import pairwise
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import torch
import torch.distributed as dist
from smoke import Benchmark
from torch import Tensor

from data_pipeline.shards.data_set import DataSet
from launcher.ranks.local import rank_environment, rank_names
from megaback.config import Config
from megaback.distributed.world import start_world
from megaback.faults.stop_request import StopRequest
from megaback.faults.watchdog import Watchdog
from megaback.training.run import Run
from megaback.training.setup import prepare_run
from megaback.training.trainer import Trainer

_LEFT_OUT_STEPS = 3
_ROWS_NAME = "rows.txt"
_NUMBERS = (torch.float64, torch.int64)


class Delayed:
    """An all-reduce that arrives no earlier than a given time."""

    def __init__(self, network: "SlowNetwork", work: Any, arrives: float, *, counts: bool) -> None:
        self._network, self._work, self._arrives, self._counts = network, work, arrives, counts

    def wait(self, *_timeout: Any) -> bool:
        asked = time.perf_counter()
        self._work.wait()
        if (left_s := self._arrives - time.perf_counter()) > 0:
            time.sleep(left_s)
        if self._counts:
            self._network.blocked_s += time.perf_counter() - asked
        return True


class SlowNetwork:
    """torch's all-reduce with a latency."""

    def __init__(self, latency_s: float, *, delays_gradients: bool) -> None:
        self._latency_s, self._delays_gradients = latency_s, delays_gradients
        self._all_reduce = dist.all_reduce
        self.blocked_s = 0.0
        """Time for which all-reduces of numbers have blocked."""

    def all_reduce(
        self, tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        counts = tensor.dtype in _NUMBERS
        latency_s = self._latency_s if counts or self._delays_gradients else 0.0
        started = time.perf_counter()
        arrives = started + latency_s
        work = self._all_reduce(tensor, op, group, async_op=True)
        delayed = Delayed(self, work, arrives, counts=counts)
        if counts:
            self.blocked_s += time.perf_counter() - started
        return delayed if async_op else delayed.wait() and None


def train_as_rank(
    environment: dict[str, str], config: Config, network: SlowNetwork, compute_ms: list[float]
) -> None:
    """Train as the rank given by the environment; rank 0 writes a row per `compute_ms`."""
    os.environ |= environment
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    torch.set_num_threads(1)
    world = start_world("cpu", config.hardware.collective_timeout_s)
    run = prepare_run(config, world, Watchdog(config.run, config.hardware, world))
    assert isinstance(run, Run)  # a new folder has steps left
    block_steps = run.data.total_steps // len(compute_ms)
    starts: list[tuple[float, float]] = []

    def begin_step(module: torch.nn.Module, _inputs: object) -> None:
        if module.training:
            starts.append((time.perf_counter(), network.blocked_s))

    def compute(module: torch.nn.Module, _inputs: object, output: Tensor) -> None:
        if module.training:
            third_s = compute_ms[(len(starts) - 1) // block_steps] / 3e3
            time.sleep(third_s)
            output.register_hook(lambda _gradient: time.sleep(2 * third_s))

    run.engine.module.register_forward_pre_hook(begin_step)
    run.engine.module.register_forward_hook(compute)
    trainer = Trainer(run, world, StopRequest())
    dist.all_reduce = network.all_reduce
    trainer.train()
    trainer.close()
    if world.is_first:
        blocks = [starts[n * block_steps : (n + 1) * block_steps] for n in range(len(compute_ms))]
        (config.run / _ROWS_NAME).write_text(
            "".join(map(row_of, compute_ms, blocks)), encoding="utf-8"
        )
    dist.destroy_process_group()
    os._exit(0)  # exit handlers of the process that was forked would remove its folder


def row_of(compute_ms: float, starts: list[tuple[float, float]]) -> str:
    """Medians over steps that begin at `starts`: time, and time blocked before."""
    steps_ms, blocked_ms = (
        [1e3 * (after - before) for before, after in pairwise(times)]
        for times in zip(*starts[_LEFT_OUT_STEPS:], strict=True)
    )
    return (
        f"computes {compute_ms:5g} ms: takes {statistics.median(steps_ms):6.1f} ms, blocked by "
        f"control {statistics.median(blocked_ms):5.2f} ms (at most {max(blocked_ms):.2f})\n"
    )


def config_of(shards: str, folder: str, steps: int, stage: int, processes: int) -> Config:
    direction = DataSet.open(shards).manifest.text_format.direction
    return Config.model_validate(
        {
            "run": f"{folder}/run",
            "data": {"shards": str(Path(shards).resolve()), "direction": direction.value},
            "model": {"num_layers": 1, "width": 32, "num_heads": 2, "tie_embeddings": True},
            "batch": {
                "context_tokens": 64,
                "global_batch_rows": processes,
                "micro_batch_rows": 1,
            },
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": steps, "precision": "fp32"},
            "zero": {"stage": stage},
            "hardware": {"device": "cpu", "preflight": "off"},
            "logging": {"tensorboard": "off"},
        }
    )


@click.command(cls=Benchmark, smoke="{shards} --latency-ms 5 --compute-ms 3,10 --block-steps 6")
@click.argument("shards")
@click.option("--processes", default=2, show_default=True, help="Number of processes.")
@click.option("--latency-ms", default=40.0, show_default=True, help="Latency of an all-reduce.")
@click.option("--compute-ms", default="30,45,60,120", show_default=True, help="Times of a step.")
@click.option("--block-steps", default=25, show_default=True, help="Steps of each time.")
@click.option("--stage", default=1, show_default=True, help="ZeRO stage.")
def main(
    shards: str, processes: int, latency_ms: float, compute_ms: str, block_steps: int, stage: int
) -> None:
    """Print the time of a step and the time that it is blocked by control messages."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.runtime.zero.stage_1_and_2  # noqa: F401 - once, before the ranks are forked

    times_ms = [float(word) for word in compute_ms.split(",")]
    for delays_gradients in (False, True):
        click.echo("gradients are delayed too" if delays_gradients else "only control is delayed")
        with TemporaryDirectory() as folder:
            steps = block_steps * len(times_ms)
            config = config_of(shards, folder, steps, stage, processes)
            network = SlowNetwork(latency_ms / 1e3, delays_gradients=delays_gradients)
            environment = rank_environment(processes)
            ranks = [
                get_context("fork").Process(
                    target=train_as_rank, args=(environment | names, config, network, times_ms)
                )
                for names in rank_names(processes)
            ]
            for rank in ranks:
                rank.start()
            for rank in ranks:
                rank.join()
            if any(rank.exitcode for rank in ranks):
                raise SystemExit(1)
            click.echo((config.run / _ROWS_NAME).read_text(encoding="utf-8"), nl=False)


if __name__ == "__main__":
    main()
