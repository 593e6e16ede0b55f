"""Cost of a training step: ours through DeepSpeed, relative to plain PyTorch with the same model.

    python benchmarks/train_step.py [--rows 8] [--precision bf16] [--turns 5]

One process against a plain loop (autocast, torch.compile, fused AdamW, clipping), and two ranks
over gloo at ZeRO 1 to 3 against the same loop under DistributedDataParallel. One thread per
process; CPU time of all threads and ranks, in turns, medians. All train 14 million parameters (6
layers, width 384) on packed documents of uneven lengths. Then: model FLOPs utilization relative to
this CPU's measured peak of matrix products in the same precision, and a profile of our step.
"""

import os
import statistics
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing import Pipe, get_context
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from typing import Any

import click
import torch
import torch._dynamo  # once, before the ranks are forked
from smoke import Benchmark
from torch import Tensor

from data_pipeline.loading.rows import IGNORED_TARGET
from launcher.ranks.local import rank_names
from megaback.config import Config
from megaback.model.attention import Segments
from megaback.model.compiler import GraphCounter
from megaback.model.gpt import ReverseGPT
from megaback.planning.flops import flops_per_token
from megaback.profiling.parts import part_of

VOCAB_SIZE = 8_888
CONTEXT_TOKENS = 512
_DOCUMENTS = (70, 130, 40, 272)
CPU = torch.device("cpu")
Step = Callable[[], None]


@dataclass(frozen=True)
class Contender:
    """A way of training: `plain`, or `zeroN` for ours at a stage."""

    kind: str
    ranks: int


@dataclass(frozen=True)
class Size:
    """Model and data of a rank."""

    layers: int
    width: int
    rows: int


@dataclass(frozen=True)
class Measure:
    """Precision and steps of a measurement."""

    precision: str
    turn_steps: int


def config_of(kind: str, size: Size, ranks: int, precision: str) -> Config:
    return Config.model_validate(
        {
            "run": "unused",
            "data": {"shards": "unused"},
            "model": {
                "num_layers": size.layers,
                "width": size.width,
                "num_heads": size.width // 64,
                "tie_embeddings": True,
            },
            "batch": {
                "context_tokens": CONTEXT_TOKENS,
                "global_batch_rows": size.rows * ranks,
                "micro_batch_rows": size.rows,
            },
            "optimizer": {"learning_rate": 6e-4},
            "training": {"steps": 1000, "precision": precision},
            "zero": {"stage": int(kind.removeprefix("zero")) if kind != "plain" else 0},
            "hardware": {"device": "cpu"},
        }
    )


def batch_of(rows: int, rank: int) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Batches of rows of the same few documents."""
    generator = torch.Generator().manual_seed(rank)
    ids_T = torch.randint(VOCAB_SIZE, (rows * CONTEXT_TOKENS,), generator=generator)
    positions_T = torch.cat([torch.arange(length) for length in _DOCUMENTS * rows])
    segments = Segments.from_lengths(_DOCUMENTS * rows, CPU)
    return ids_T, ids_T.roll(-1), positions_T, segments


def plain_step(config: Config, rank: int, ranks: int) -> Step:
    from torch.nn.parallel import DistributedDataParallel

    model = ReverseGPT(config.model.resolved(), VOCAB_SIZE)
    model.initialize(0)
    trained: Any = DistributedDataParallel(model) if ranks > 1 else model
    model.exclude_attention_from_compile()
    trained = torch.compile(trained)
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), fused=True)
    batch = batch_of(config.batch.micro_batch_rows, rank)
    num_targets = int((batch[1] != IGNORED_TARGET).sum())
    is_bf16 = config.training.precision == "bf16"

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=is_bf16):
            loss = trained(*batch).sum()
        (loss / num_targets).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_step(config: Config, rank: int) -> Step:
    from megaback.distributed.engine import set_learning_rates, start_engine, take_step

    model = ReverseGPT(config.model.resolved(), VOCAB_SIZE)
    model.initialize(0)
    rows = config.batch.micro_batch_rows
    model.exclude_attention_from_compile()
    engine = start_engine(model, config, rows, 1, GraphCounter())
    batch = batch_of(rows, rank)
    num_targets = int((batch[1] != IGNORED_TARGET).sum())
    engine.train()

    def step() -> None:
        loss = engine(*batch).sum()
        engine.backward(loss / num_targets)
        set_learning_rates(engine, 1.0)
        take_step(engine, lambda _norm: None)

    return step


def serve(
    environment: dict[str, str],
    parent: Connection,
    contender: Contender,
    size: Size,
    measure: Measure,
) -> None:
    """A rank of a contender; sends its answers, or the traceback with which it ends."""
    os.environ |= environment
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nowhere, stream)
    try:
        answer(parent, contender, size, measure)
    except BaseException:  # noqa: BLE001 - is printed by the other process
        parent.send(traceback.format_exc())
    os._exit(0)


def answer(parent: Connection, contender: Contender, size: Size, measure: Measure) -> None:
    """For each word received, run some steps and send the CPU time of one, or the profile."""
    from megaback.distributed.world import start_world

    torch.set_num_threads(1)
    world = start_world("cpu", 600)
    config = config_of(contender.kind, size, world.size, measure.precision)
    step = (
        plain_step(config, world.rank, world.size)
        if contender.kind == "plain"
        else our_step(config, world.rank)
    )
    for _ in range(3):
        step()
    parent.send("ready")
    while True:
        if parent.recv() == "profile":
            parent.send(profile_of(step, measure.turn_steps))
            continue
        started = time.process_time()
        for _ in range(measure.turn_steps):
            step()
        parent.send((time.process_time() - started) / measure.turn_steps)


def profile_of(step: Step, steps: int) -> dict[str, float]:
    """Share of self time by operator."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            step()
    found: Counter[str] = Counter()
    for event in profiler.key_averages():
        found[part_of(event.key)] += event.self_cpu_time_total
    total = sum(found.values())
    return {name: share / total for name, share in found.most_common()}


class Ranks:
    """The processes of a contender: forks, which need not import torch and DeepSpeed again."""

    def __init__(self, contender: Contender, size: Size, measure: Measure) -> None:
        self._ranks = [
            self._start(names, contender, size, measure) for names in rank_names(contender.ranks)
        ]
        for _, rank in self._ranks:
            self._answer(rank)

    def ask(self, what: str) -> list[Any]:
        """Answers of all ranks."""
        for _, rank in self._ranks:
            rank.send(what)
        return [self._answer(rank) for _, rank in self._ranks]

    def close(self) -> None:
        for process, _ in self._ranks:
            process.kill()
            process.join()

    @staticmethod
    def _start(
        names: dict[str, str], contender: Contender, size: Size, measure: Measure
    ) -> tuple[ForkProcess, Connection]:
        ours, theirs = Pipe()
        environment = {"OMP_NUM_THREADS": "1", **names}
        arguments = (environment, theirs, contender, size, measure)
        process = get_context("fork").Process(target=serve, args=arguments, daemon=True)
        process.start()
        theirs.close()
        return process, ours

    @staticmethod
    def _answer(rank: Connection) -> Any:
        try:
            answer = rank.recv()
        except EOFError:
            raise SystemExit("a rank was killed") from None
        if isinstance(answer, str) and answer != "ready":
            raise SystemExit(answer)
        return answer


def peak_flops(dtype: torch.dtype) -> float:
    """FLOP/s of a large square product on one thread."""
    torch.set_num_threads(1)
    size = 1024
    left, right = torch.randn(size, size).to(dtype), torch.randn(size, size).to(dtype)
    times = []
    for _ in range(12):
        started = time.process_time()
        left @ right
        times.append(time.process_time() - started)
    return 2 * size**3 / min(times)


@click.command(
    cls=Benchmark, smoke="--layers 1 --width 64 --rows 1 --precision fp32 --turns 1 --turn-steps 1"
)
@click.option("--layers", default=6, show_default=True, help="Number of layers.")
@click.option("--width", default=384, show_default=True, help="Model width; 64 per head.")
@click.option("--rows", default=8, show_default=True, help="Rows of 512 tokens per rank and step.")
@click.option("--precision", default="bf16", show_default=True, help="Precision of both sides.")
@click.option(
    "--turns", default=5, show_default=True, help="Turns per contender; medians are printed."
)
@click.option("--turn-steps", default=2, show_default=True, help="Steps per turn.")
def main(layers: int, width: int, rows: int, precision: str, turns: int, turn_steps: int) -> None:
    """Print CPU time per step of every contender and its ratio, then a profile of ours."""
    size = Size(layers, width, rows)
    measure = Measure(precision, turn_steps)
    peak = peak_flops(torch.bfloat16 if precision == "bf16" else torch.float32)
    model = ReverseGPT(config_of("plain", size, 1, precision).model.resolved(), VOCAB_SIZE)
    # Each token attends to half of its document, itself included.
    attended = sum(length * (length + 1) / 2 for length in _DOCUMENTS) / CONTEXT_TOKENS
    step_flops = flops_per_token(model.shape, VOCAB_SIZE, attended) * rows * CONTEXT_TOKENS
    click.echo(
        f"{model.num_parameters():,} parameters, {rows} x {CONTEXT_TOKENS} tokens per rank, "
        f"{precision}; torch {torch.__version__}, {os.cpu_count()} cores; matrix products reach "
        f"{peak / 1e9:.0f} GFLOP/s per thread"
    )
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.runtime.zero.stage3  # noqa: F401 - once, before the ranks are forked

    for ranks in (1, 2):
        kinds = ["plain", "zero1"] if ranks == 1 else ["plain", "zero1", "zero2", "zero3"]
        running = {kind: Ranks(Contender(kind, ranks), size, measure) for kind in kinds}
        times: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(turns):
            for kind, one in running.items():
                times[kind].append(sum(one.ask("go")) / ranks)
        for kind, measured in times.items():
            cpu_s = statistics.median(measured)
            # Ratios within a turn, as the machine's speed varies.
            ratios = [one / other for one, other in zip(measured, times["plain"], strict=True)]
            title = kind if kind != "plain" else "plain" if ranks == 1 else "DDP"
            click.echo(
                f"{ranks} rank{'s' * (ranks > 1)}  {title:<6}{cpu_s:7.3f} CPU s per step and rank, "
                f"{statistics.median(ratios):.3f} of {'DDP' if ranks > 1 else 'plain'} "
                f"({min(ratios):.3f} to {max(ratios):.3f}), MFU {step_flops / cpu_s / peak:.1%}"
            )
        if ranks == 1:
            shares = running["zero1"].ask("profile")[0]
            listed = ", ".join(f"{name} {share:.1%}" for name, share in shares.items())
            click.echo(f"our time: {listed}")
        for one in running.values():
            one.close()


if __name__ == "__main__":
    main()
