"""Host waits per training step and per sampled token, and batches copied while a GPU computes."""

from collections import Counter

import torch

from benchmarks.gpu_test.bench import WANTS_A_GPU, Bench
from benchmarks.gpu_test.claims import BATCHES
from benchmarks.gpu_test.runs import run_config
from benchmarks.gpu_test.training import alone, synthetic_batches
from benchmarks.gpu_test.waiting import counted_waits, is_ours
from data_pipeline.loading.rows import Batch
from megaback.config_file import load_config
from megaback.distributed.world import World
from megaback.faults.stop_request import StopRequest
from megaback.faults.watchdog import Watchdog
from megaback.training.device_batches import Arguments, DeviceBatches
from megaback.training.run import Run
from megaback.training.setup import prepare_run
from megaback.training.trainer import Trainer
from megaback.training.validation import to_device

MAX_OUR_WAITS = 1
"""Waits of our code in a step, for the gradient norm: docs/decisions/0056-fake-gpu.md."""
_STEPS = 8


class _StepMarks(Watchdog):
    """A watchdog that ends nothing, and notes how many waits there were before each step."""

    def attach(self, waits: list[str]) -> None:
        self._waits = waits
        self.before: dict[int, int] = {}

    def set_phase(self, phase: str, step: int) -> None:
        if phase == "reading its rows":
            self.before.setdefault(step, len(self._waits))


def run(bench: Bench) -> None:
    world = alone(bench)
    for stage, optimizer in bench.sized(
        ((0, "adamw"), (1, "muon"), (2, "adamw"), (3, "adamw")), ((1, "muon"),), ((1, "muon"),)
    ):
        name = f"a step at ZeRO {stage}, {optimizer}"
        with bench.attempt(name, BATCHES):
            _check_steps(bench, world, name, stage, optimizer)
    with bench.attempt("copies during computation", BATCHES):
        _check_overlap(bench)


def _check_steps(bench: Bench, world: World, name: str, stage: int, optimizer: str) -> None:
    """Waits of the last steps of a real training loop, before its end."""
    path = run_config(
        bench,
        bench.work / f"waits-{stage}",
        training={"steps": _STEPS, "compile": "off"},
        zero={"stage": stage},
        optimizer={"name": optimizer},
        hardware={"memory_check": "off"},
    )
    config = load_config(path, ())
    with counted_waits(bench.device) as waits:
        watchdog = _StepMarks(config.run, config.hardware, world)
        watchdog.attach(waits)
        run = prepare_run(config, world, watchdog)
        assert isinstance(run, Run)
        trainer = Trainer(run, world, StopRequest())
        try:
            trainer.train()
        finally:
            trainer.close()
            watchdog.mark_exited("measured")
            run.engine.destroy()
    first, last = _STEPS - 4, _STEPS - 1
    places = waits[watchdog.before[first] : watchdog.before[last]]
    if not bench.is_gpu:
        bench.require(f"{name}: loop", len(watchdog.before) >= _STEPS, f"{_STEPS} steps")
        bench.skip(name, WANTS_A_GPU, BATCHES)
        return
    per_step = {place: count / (last - first) for place, count in Counter(places).items()}
    ours = sum(count for place, count in per_step.items() if is_ours(place))
    bench.require(
        name,
        ours <= MAX_OUR_WAITS,
        f"at most {MAX_OUR_WAITS} in our code: "
        + ", ".join(f"{place} {count:g}" for place, count in sorted(per_step.items())),
        BATCHES,
        waits_of_ours=ours,
        waits_of_libraries=sum(per_step.values()) - ours,
    )


def _check_overlap(bench: Bench) -> None:
    """Whether a batch arrives while the work that was queued before it still computes."""
    context_tokens, rows = 1024, bench.sized(64, 2, 1)
    batches = synthetic_batches(rows, context_tokens, 600, 2)
    copied: list[torch.Event] = []

    def convert(batch: Batch) -> Arguments:
        arguments = to_device(batch, bench.device, context_tokens)
        if bench.is_gpu:
            copied.append(torch.accelerator.current_stream(bench.device).record_event())
        return arguments

    sent = DeviceBatches(bench.device, convert)
    size = bench.sized(8192, 64, 16)
    left = torch.randn(size, size, device=bench.device, dtype=torch.bfloat16)
    for _ in sent.take(batches, ()):  # allocates pinned memory and streams
        left = left @ left * 1e-3
    bench.meter.wait()
    arrived_before_end = None
    for batch, arguments in sent.take(batches, ()):
        if batch is batches[0]:
            for _ in range(bench.sized(100, 1, 1)):
                left = left @ left * 1e-3
            if bench.is_gpu:
                computed = torch.accelerator.current_stream(bench.device).record_event()
        elif bench.is_gpu:
            copied[-1].synchronize()  # on its own stream, begun after the computation was queued
            arrived_before_end = not computed.query()
        assert len(arguments[0]) == rows * context_tokens
    bench.meter.wait()
    if arrived_before_end is None:
        bench.skip("copies during computation", WANTS_A_GPU, BATCHES)
        return
    bench.require(
        "copies during computation",
        arrived_before_end,
        "a batch arrives before the computation that was queued before it ends",
        BATCHES,
    )
