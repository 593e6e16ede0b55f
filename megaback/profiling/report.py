"""Profile of some training steps of a rank, as its process writes it. Loads no torch."""

from dataclasses import dataclass
from pathlib import Path

from megaback.config import ALL_KEPT, Config
from megaback.config_file import load_config

REPORT_NAME = "profile.json"
TRACE_NAME = "trace.json.gz"
MEMORY_NAME = "memory.pickle"
WARMUP_STEPS = 3
"""Steps before the profiled ones: they compile, allocate and connect."""
DEFAULT_STEPS = 3
RUN_FOLDER = ".run"
"""Folder of the short run, within that of the result."""
PHASES = ("data", "forward", "backward", "optimizer", "between")
"""Phases of a step; `between` is all other work, as metrics and the sending of batches."""


@dataclass(frozen=True, kw_only=True)
class PartTime:
    """Time of one part of a phase, per step."""

    phase: str
    part: str
    cpu_s: float
    """Time on the host's threads, without what a part within it takes."""
    device_s: float
    """Time of its kernels on the GPU; 0 on a CPU."""


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Profile of a rank."""

    rank: int
    world_size: int
    host: str
    device: str
    device_name: str
    zero_stage: int
    steps: int
    """Number of profiled steps."""
    step_s: float
    """Mean duration of a profiled step, in seconds: profiling makes it longer."""
    unprofiled_step_s: float
    """Duration of the last step before, in seconds."""
    mfu: float | None
    """Model FLOPs utilization of that step; None if the devices' peak is unknown."""
    idle_share: float | None
    """Share of the profiled steps in which no kernel ran on the GPU; None on a CPU."""
    tokens_per_step: int
    memory_peak_bytes: int
    parts: tuple[PartTime, ...]


def report_path(out: Path) -> Path:
    return out / REPORT_NAME


def short_config(config: Path, overrides: tuple[str, ...], out: Path, steps: int) -> Config:
    """The config of a short run within `out` that writes nothing elsewhere, and is no branch.

    Raises the errors of `load_config`.
    """
    settings = load_config(config, _short(overrides, out, steps))
    return settings.model_copy(update={"branch_from": None, "keep": ALL_KEPT})


def _short(overrides: tuple[str, ...], out: Path, steps: int) -> tuple[str, ...]:
    return (
        *overrides,
        f"run={out / RUN_FOLDER}",
        f"training.steps={WARMUP_STEPS + steps}",
        "training.epochs=null",
        "optimizer.decay_at=null",
        "validation.every_steps=null",
        "validation.patience=null",
        "validation.suites=[]",
        "checkpoint.every_steps=null",
        "checkpoint.copy_to=null",
        "logging.wandb=off",
        "logging.tensorboard=off",
        "logging.every_steps=1",
        "hardware.preflight=off",
    )
