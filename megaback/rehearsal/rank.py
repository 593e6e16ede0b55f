"""One rank of many, alone in its process: real data, engine, optimizer and checkpoint.

`Trainer` and all below it run as in a run of that size, except the collectives
(`rehearsal.collectives`) and what the config of a rehearsal disables (`rehearsal.job`).
"""

import logging
import os
from collections import Counter, defaultdict
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from time import monotonic, process_time
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from data_pipeline.errors import MegabackError
from megaback.checkpoints.state import holdings_of, num_updates
from megaback.config import Config
from megaback.config_operation import HardwareSection
from megaback.data import Data, open_data
from megaback.distributed.world import CollectiveExit, World, choose_device, without_operators
from megaback.environment import LAUNCHER_VARIABLE
from megaback.faults.stop_request import StopRequest
from megaback.faults.watchdog import Watchdog
from megaback.model.lora import require_peft
from megaback.rehearsal.collectives import CollectiveLog, join
from megaback.rehearsal.memory_meter import MemoryMeter
from megaback.rehearsal.ownership import matrix_owners, ownership_of
from megaback.rehearsal.report import FirstBatch, Owned, RankReport, Traffic
from megaback.rehearsal.skipped_arithmetic import arithmetic_skipped
from megaback.run_folder import CHECKPOINTS_FOLDER, step_name
from megaback.training.run import Run
from megaback.training.setup import prepare_run
from megaback.training.start import AlreadyTrained
from megaback.training.trainer import Trainer

_Result = TypeVar("_Result")
_STEP_PHASES = ("reading its rows", "computing gradients", "updating")


class SoloWorld(World):
    """The world of a rank without peers."""

    def of_first(self, value: _Result, kind: Any) -> _Result:  # noqa: ARG002
        """This rank's value: nothing is received from the first."""
        return value

    def stop_if_any(self, error: MegabackError | None) -> None:
        if error is not None:
            raise CollectiveExit(error.exit_code, error)


class PhaseClock(Watchdog):
    """Durations of the phases; it writes nothing and ends nothing."""

    def __init__(
        self,
        run: Path,
        section: HardwareSection,
        world: World,
        log: CollectiveLog,
        memory: MemoryMeter,
    ) -> None:
        super().__init__(run, section, world)
        self._folder, self._log, self._memory = run, log, memory
        self._since, self._cpu_since = monotonic(), process_time()
        self.duration_s: dict[tuple[int, str], float] = defaultdict(float)
        self.cpu_s: dict[int, float] = defaultdict(float)
        self.start_bytes: int | None = None
        self.training_bytes = 0

    def set_phase(self, phase: str, step: int) -> None:
        self._memory.wait()
        now, cpu_now, log = monotonic(), process_time(), self._log
        self.duration_s[log.step, log.phase] += now - self._since
        if log.phase in _STEP_PHASES:
            self.cpu_s[log.step] += cpu_now - self._cpu_since
        self._since, self._cpu_since, log.step, log.phase = now, cpu_now, step, phase
        if phase in _STEP_PHASES and self.start_bytes is None:
            self.start_bytes = self._memory.peak_bytes()
            self._memory.restart()
        elif phase == "saving":
            self.training_bytes = self._memory.peak_bytes()

    def open(self) -> None:
        pass

    def remember_folder(self) -> None:
        pass

    def folder(self) -> Path:
        return self._folder


def rehearse_rank(
    config: Config,
    rank: int,
    world_size: int,
    ranks_per_node: int,
    *,
    skip_arithmetic: bool = False,
) -> RankReport:
    """Train `training.steps` steps as a rank, and save. `config.run` is an empty folder.

    Only once per process. Raises the MegabackError that the run would end with.
    """
    device = choose_device(config.hardware.device, 0)
    # A GPU's local rank is the index of its device.
    local_rank = rank % ranks_per_node if device.type == "cpu" else device.index
    os.environ |= {
        "RANK": str(rank),
        "WORLD_SIZE": str(world_size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_SIZE": str(ranks_per_node),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
        LAUNCHER_VARIABLE: str(os.getppid()),  # if it ends, so does this rank
    }
    log = CollectiveLog()
    world = SoloWorld(rank, world_size, device, join(rank, world_size, log))
    prepare_deepspeed(device.type)
    skipped = arithmetic_skipped() if skip_arithmetic else nullcontext()
    try:
        with skipped:
            return _rehearse(config, world, log)
    except CollectiveExit as ending:
        raise (ending.error or MegabackError(f"rank {rank} ended without an error")) from None
    except MegabackError:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise MegabackError(
            f"rank {rank} of {world_size} fails while {log.phase}: {reason}; a run of this size "
            "would fail there too, see the traceback"
        ) from error


def prepare_deepspeed(device_type: str) -> None:
    """Import DeepSpeed for a type of device; with a default group, also let it use this group."""
    os.environ["DS_ACCELERATOR"] = device_type
    import deepspeed
    from deepspeed.runtime.zero import partitioned_param_coordinator as coordinator

    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    without_operators()
    # Stage 3 compares the order of its modules with that of rank 0, which is not there.
    coordinator.assert_ints_same_as_other_ranks = lambda _: None
    if dist.is_initialized():
        deepspeed.init_distributed(auto_mpi_discovery=False, verbose=False)


def _rehearse(config: Config, world: World, log: CollectiveLog) -> RankReport:
    first_batch = _first_batch(config, world)
    # The first rank of a run creates it.
    target = config.run / CHECKPOINTS_FOLDER / step_name(config.training.steps or 0)
    if not world.is_first:
        target.mkdir(parents=True)
    if config.finetune.adapters is not None:
        require_peft()  # its libraries are not memory of the run
    memory = MemoryMeter.of(world.device)
    started = monotonic()
    clock = PhaseClock(config.run, config.hardware, world, log, memory)
    run = prepare_run(config, world, clock)
    assert not isinstance(run, AlreadyTrained)
    run = replace(run, data=replace(run.data, val=()))
    trainer = Trainer(run, world, StopRequest())
    start_s = monotonic() - started
    try:
        trainer.train()
    finally:
        trainer.close()
    ownership = ownership_of(run.engine)
    steps, updates = run.data.total_steps, num_updates(run.engine)
    if updates < steps:
        raise MegabackError(
            f"rank {world.rank}: {steps - updates} of {steps} steps were skipped for a non-finite "
            "loss or gradient norm, and cannot be measured; rehearse with training.precision=fp32"
        )
    phase_s = {phase: clock.duration_s[steps, phase] for phase in _STEP_PHASES}
    return RankReport(
        rank=world.rank,
        device=world.device.type,
        first_batch=first_batch,
        owned=_owned(run, ownership.parameters),
        ownership=ownership,
        start_s=start_s,
        step_s=sum(phase_s.values()),
        step_cpu_s=clock.cpu_s[steps],
        phase_s=phase_s,
        memory_start_bytes=clock.start_bytes or 0,
        memory_training_bytes=clock.training_bytes,
        memory_saving_bytes=memory.peak_bytes(),
        traffic=_traffic(log, steps, _STEP_PHASES),
        start_traffic=_traffic(log, 0, ("starting", "checking the nodes")),
        checkpoint={path.name: path.stat().st_size for path in sorted(target.glob("*-*"))},
    )


def _first_batch(config: Config, world: World) -> FirstBatch:
    """Read the rows of the first step, without preparing later ones."""
    section = config.data.model_copy(update={"threads": 0})
    before, started = _read_bytes(), monotonic()
    data = open_data(config.model_copy(update={"data": section}), world.rank, world.size)
    batches = data.training.at(0)
    duration_s, read_bytes = monotonic() - started, _read_bytes() - before
    rows = data.training.rank_rows
    data.training.close()
    del batches
    return FirstBatch(
        rows=rows,
        lanes=_num_lanes(data, world.rank // data.part.count * rows, rows),
        read_bytes=read_bytes,
        duration_s=duration_s,
    )


def _num_lanes(data: Data, first_row: int, num_rows: int) -> int:
    """Number of lanes that contain the consecutive rows of the first step."""
    stream_of, row_of = data.mixture.deal(np.arange(first_row, first_row + num_rows)[None])
    lanes = 0
    for number, stream in enumerate(data.streams):
        order = stream.order
        position = row_of[stream_of == number] % order.global_batch_rows
        lanes += len(np.unique(position // (order.global_batch_rows // order.lanes)))
    return lanes


def _owned(run: Run, num_trained: int) -> Owned:
    engine = run.engine
    stage = engine.zero_optimization_stage()
    holdings = holdings_of(engine)
    weights = sum(piece.length for holding in holdings for _, piece in holding.runs)
    if stage:
        matrices = matrix_owners(engine).count(engine.shards.rank)
    else:
        matrices = sum(holding.is_orthogonalized for holding in holdings)
    state = engine.basic_optimizer.state.values()
    return Owned(
        weights=weights,
        gradients=weights if stage >= 2 else num_trained,
        optimizer_bytes=sum(
            value.nbytes
            for of_tensor in state
            for value in of_tensor.values()
            if isinstance(value, torch.Tensor)
        ),
        matrices=matrices,
    )


def _traffic(log: CollectiveLog, step: int, phases: tuple[str, ...]) -> tuple[Traffic, ...]:
    """Collectives of a step, by group and kind."""
    calls: Counter[tuple[str, str]] = Counter()
    sent_bytes: Counter[tuple[str, str]] = Counter()
    for one, count in log.calls.items():
        # Control messages during the last update belong to the end of the run.
        is_end = one.group == "control" and one.phase == "updating"
        if one.step == step and one.phase in phases and not is_end:
            key = (one.group, one.kind)
            calls[key] += count
            sent_bytes[key] += log.sent_bytes[one]
    return tuple(
        Traffic(group=group, kind=kind, calls=count, sent_bytes=sent_bytes[group, kind])
        for (group, kind), count in sorted(calls.items(), reverse=True)
    )


def _read_bytes() -> int:
    """Bytes that this process has read from files."""
    text = Path("/proc/self/io").read_text(encoding="ascii")
    return int(next(line for line in text.splitlines() if line.startswith("rchar:")).split()[1])
