"""Sections `hardware`, `guard`, `checkpoint` and `logging` of the config. Loads no torch."""

from typing import Annotated, Literal

from data_pipeline.common import number_ranges as ranges
from megaback.config_data import Address
from megaback.config_section import ON_OR_OFF, Section


class HardwareSection(Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    """Type of device to train on. auto: cuda where PyTorch can use one, cpu elsewhere."""
    processes: Annotated[int, ranges.MANY] | None = None
    """Number of ranks that `megaback train` starts on this machine. Default: one per GPU, or one on
    a CPU."""
    attention: Literal["auto", "varlen", "flash_attn", "flash_attn_4", "sdpa"] = "auto"
    """Attention backend. varlen: PyTorch's for packed documents; flash_attn, flash_attn_4: the
    packages flash-attn and, for Hopper and newer GPUs, flash-attn-4; sdpa: PyTorch's for any
    device. auto: the first of flash_attn_4, varlen, flash_attn and sdpa that works."""
    device_name: str | None = None
    """Device that `megaback plan` and `submit` assume: h100-80gb, a100-40gb, …"""
    peak_flops: Annotated[float, ranges.POSITIVE] | None = None
    """Peak throughput of a device, in FLOP/s, for model FLOPs utilization. Default: known for
    common GPUs."""
    collective_timeout_s: Annotated[float, ranges.SECONDS] = 1800
    """Timeout of each phase before the first step completes (connect, read a checkpoint, compile),
    in seconds; exceeding it aborts all ranks."""
    step_timeout_s: Annotated[float, ranges.SECONDS] = 300
    """Timeout of each phase from then on (a micro-batch, a batch of validation, an update, a save),
    in seconds."""
    heartbeat_s: Annotated[float, ranges.SECONDS] = 10
    """Interval of the heartbeats by which each rank reports its phase in the run's folder, in
    seconds."""
    silence_timeout_s: Annotated[float, ranges.SECONDS] = 90
    """Time in seconds, at least three heartbeats, after which a rank on another host counts as lost
    if its heartbeat does not change while this rank waits in one phase. A network disk may show
    heartbeats a minute late."""
    preflight: Annotated[Literal["auto", "on", "strict", "off"], ON_OR_OFF] = "auto"
    """Check of every node before the first step of each start. auto: with several ranks; strict:
    stop also at what is otherwise a warning, such as a slow device."""
    memory_check: Annotated[Literal["on", "off"], ON_OR_OFF] = "on"
    """Memory check, which refuses a run that needs more than its devices or this machine have."""


class GuardSection(Section):
    """Skipped steps: they are counted in the metrics, and the schedule still advances."""

    max_skipped_steps: Annotated[int, ranges.COUNT_OR_ZERO] = 10
    """Maximum number of consecutive skipped steps; one more ends the run. Steps with a non-finite
    loss or gradient norm are always skipped."""
    spike_nats: Annotated[float, ranges.POSITIVE] | None = None
    """Limit of a step's loss above the median of the window, in nats per token; above, the step is
    skipped. Default: no limit."""
    spike_norm_ratio: Annotated[float, ranges.RATIO_ABOVE_ONE] | None = None
    """Limit of a step's gradient norm, as a multiple of the window's median; above, the step is
    skipped. Default: no limit."""
    window_steps: Annotated[int, ranges.COUNT] = 100
    """Length of the window of the last updates, in steps; until it is full, nothing is a spike."""


class CheckpointSection(Section):
    every_steps: Annotated[int, ranges.COUNT] | None = None
    """Interval between checkpoints, in steps, besides those at the end of the run and at a
    signal."""
    keep_last: Annotated[int, ranges.TWO_OR_MORE] = 3
    """Number of newest checkpoints that are kept."""
    keep_every_steps: Annotated[int, ranges.COUNT] | None = None
    """Interval, in steps, of checkpoints that are kept for good: those of its multiples."""
    background: bool = True
    """Background writing, from a copy in host memory, while training continues."""
    copy_to: Address | None = None
    """Path or URL of a second location (s3://bucket/run): each complete checkpoint is copied there
    in the background, under the run's name, and a run that has lost its own resumes from it."""


class LoggingSection(Section):
    every_steps: Annotated[int, ranges.COUNT] = 10
    """Interval between lines on the console, in steps; metrics.jsonl has every step."""
    wandb: Annotated[Literal["off", "online", "offline"], ON_OR_OFF] = "off"
    """Mode of Weights & Biases. offline: written into the run's folder, to be uploaded later."""
    wandb_project: str = "megaback"
    """Name of the Weights & Biases project."""
    tensorboard: Annotated[Literal["auto", "on", "off"], ON_OR_OFF] = "auto"
    """Event files of TensorBoard, in the run's folder. auto: where tensorboard is installed."""
    rank_times: bool = False
    """Slowest rank of each step by its own forward passes, and its lag, in metrics.jsonl."""
