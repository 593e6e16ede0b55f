"""Training loop that profiles some steps of one rank, and saves and validates nothing."""

import json
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import wraps
from pathlib import Path
from time import monotonic
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile, record_function

from data_pipeline.common.atomic import partial_file, write_text
from data_pipeline.errors import UserInterruptError
from data_pipeline.loading.rows import Batch
from megaback.distributed.device_limits import available_memory, peak_memory_bytes
from megaback.distributed.world import World
from megaback.faults.stop_request import StopRequest
from megaback.profiling.breakdown import ANNOTATION, idle_share, time_by_part
from megaback.profiling.report import MEMORY_NAME, TRACE_NAME, Profile, report_path
from megaback.training.agreement import Agreement
from megaback.training.run import Run
from megaback.training.trainer import Trainer

_COLLECTIVES = (
    "all_reduce",
    "reduce",
    "broadcast",
    "all_gather",
    "all_gather_into_tensor",
    "reduce_scatter",
    "reduce_scatter_tensor",
    "all_to_all_single",
    "barrier",
)
_MAX_ALLOCATIONS = 1_000_000


@dataclass(frozen=True)
class ProfiledSteps:
    """The steps of a rank that are profiled."""

    rank: int
    warmup_steps: int
    """Number of steps before; the first ones compile, allocate and connect."""
    steps: int


class ProfiledTrainer(Trainer):
    """A trainer whose last steps are profiled on one rank."""

    def __init__(
        self, run: Run, world: World, stop: StopRequest, profiled: ProfiledSteps, out: Path
    ) -> None:
        super().__init__(run, world, stop)
        self._profiled, self._out = profiled, out
        self._is_profiled = world.rank == profiled.rank
        self._ends_s: list[float] = []
        self._profiler: profile | None = None
        if self._is_profiled:
            self._annotate()

    def _annotate(self) -> None:
        engine = self._run.engine
        for owner, name, phase in (
            (engine, "forward", "forward"),
            (engine, "backward", "backward"),
            (engine, "step", "optimizer"),
            (self._ahead, "read", "data"),
            *((dist, name, "communication") for name in _COLLECTIVES if hasattr(dist, name)),
        ):
            setattr(owner, name, _annotated(getattr(owner, name), phase))
        if engine.zero_optimization_stage() == 3:
            coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
            fetch = _annotated(coordinator.fetch_sub_module, "communication")
            coordinator.fetch_sub_module = fetch

    def _validate(self, done: int) -> None:  # noqa: ARG002
        return

    def _save(self, done: int) -> None:
        self._saved_step = done

    def _stop_after(self, step: int) -> NoReturn:
        raise UserInterruptError(f"interrupted after {step} steps; nothing was written")

    def _train_step(
        self, step: int, micro_batches: list[Batch], agreed: Agreement, started: float
    ) -> None:
        super()._train_step(step, micro_batches, agreed, started)
        self._ends_s.append(monotonic())
        if self._is_profiled and step + 1 == self._profiled.warmup_steps:
            self._begin()
        elif self._profiler is not None and step + 1 == self._run.data.total_steps:
            self._end()

    def _begin(self) -> None:
        activities = [ProfilerActivity.CPU]
        if self._world.device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.synchronize(self._world.device)
            torch.cuda.memory._record_memory_history(max_entries=_MAX_ALLOCATIONS, stacks="python")
        self._profiler = profile(activities=activities, profile_memory=True)
        self._profiler.start()
        self._begun_s = monotonic()

    def _end(self) -> None:
        assert self._profiler is not None
        if self._world.device.type == "cuda":
            torch.cuda.synchronize(self._world.device)
        self._ended_s = monotonic()
        self._profiler.stop()

    def write(self) -> None:
        """Write the trace, the memory timeline and the report. Raises OSError."""
        assert self._profiler is not None
        with partial_file(self._out / TRACE_NAME) as partial:
            # PyTorch compresses a file of this name.
            compressed = partial.with_name(f"{partial.name}.gz")
            try:
                self._profiler.export_chrome_trace(str(compressed))
                compressed.rename(partial)
            finally:
                compressed.unlink(missing_ok=True)
        if self._world.device.type == "cuda":
            with partial_file(self._out / MEMORY_NAME) as partial:
                torch.cuda.memory._dump_snapshot(str(partial))  # type: ignore[no-untyped-call]
        write_text(report_path(self._out), json.dumps(asdict(self._report()), indent=2) + "\n")

    def _report(self) -> Profile:
        assert self._profiler is not None
        run, world, steps = self._run, self._world, self._profiled.steps
        events = self._profiler.events()  # type: ignore[no-untyped-call]
        duration_s = self._ended_s - self._begun_s
        warmup = self._profiled.warmup_steps
        plain_s = self._ends_s[warmup - 1] - self._ends_s[warmup - 2]
        share = run.step_flops_share(world)
        batch = run.config.batch
        return Profile(
            rank=world.rank,
            world_size=world.size,
            host=socket.gethostname(),
            device=world.device.type,
            device_name=available_memory(world.device).device,
            zero_stage=run.config.zero.stage,
            steps=steps,
            step_s=duration_s / steps,
            unprofiled_step_s=plain_s,
            mfu=None if share is None else share / plain_s,
            idle_share=idle_share(events, duration_s),
            tokens_per_step=batch.global_batch_rows * batch.context_tokens,
            memory_peak_bytes=int(peak_memory_bytes(world.device)),
            parts=time_by_part(events, steps),
        )


def _annotated(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The function, whose calls are annotated in the profile."""

    @wraps(function)
    def call(*arguments: Any, **options: Any) -> Any:
        with record_function(f"{ANNOTATION}{name}"):
            return function(*arguments, **options)

    return call
