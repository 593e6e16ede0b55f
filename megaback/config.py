"""What a run is: one YAML file plus `key.sub=value`, checked as a whole before anything starts.

Importing this module loads no torch. Every field is explained where it stands; a key that does not
exist, or a value that cannot work, is refused with one sentence.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    field_serializer,
    field_validator,
    model_validator,
)

from data_pipeline.common import number_ranges as ranges
from data_pipeline.errors import BatchError
from data_pipeline.redaction import shown_url
from data_pipeline.storage.address_variables import kept
from data_pipeline.text.codec import Direction

_WHOLE = re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9]*)?([eE][-+]?[0-9]{1,2})?")


Address = Annotated[str, AfterValidator(kept)]
"""A path or URL, whose secrets the environment holds: no copy of a config has them."""


def _as_word(value: Any) -> Any:
    """YAML reads the words on and off as true and false."""
    return {True: "on", False: "off"}[value] if isinstance(value, bool) else value


def _kinds(annotation: Any) -> list[Any]:
    """A type and all that it is made of: `Annotated[int, …] | None` has an int in it."""
    return [annotation, *(kind for part in get_args(annotation) for kind in _kinds(part))]


def _as_number(value: Any, annotation: Any) -> Any:
    kinds = _kinds(annotation)
    if isinstance(value, bool) and bool not in kinds and any(x in kinds for x in (int, float, 1)):
        return str(value).lower()  # which the field refuses; true would be 1
    if isinstance(value, str) and int in kinds and _WHOLE.fullmatch(value):
        number = float(value.replace("_", ""))
        return int(number) if number.is_integer() else number
    return value


class Section(BaseModel):
    """A part of the config: immutable, and without unknown keys."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _numbers(cls, fields: Any) -> Any:
        """`1e3` is a whole number, which YAML takes for text; `yes` and `true` are no numbers."""
        if not isinstance(fields, dict):
            return fields
        known = cls.model_fields
        return {
            key: _as_number(value, known[key].annotation) if key in known else value
            for key, value in fields.items()
        }


class WeightedShards(Section):
    path: Address
    """Folder or URL of a data set."""
    weight: Annotated[float, ranges.POSITIVE] = 1.0
    """Its part of all rows, relative to the other weights."""


class DataSection(Section):
    shards: tuple[WeightedShards, ...]
    """Folder that `megaback shards build` made, or its URL; or several, mixed by weight."""
    direction: Direction = Direction.BACKWARD
    """How the model reads. Shards of unit `token` serve both directions."""
    lanes: Annotated[int, ranges.SIZE] | None = None
    """Parallel streams of frames; a divisor of global_batch_rows. Default: as many as there are
    rows in a batch, or as the data can feed. Part of the order: it does not depend on ranks."""
    window_frames: Annotated[int, ranges.COUNT] = 8
    """Rows are shuffled among this many frames of a lane."""
    threads: Annotated[int, ranges.MANY_OR_ZERO] = 1
    """Decode frames ahead of the training step; 0: when they are needed. Changes no batch."""
    on_bad_frame: Literal["stop", "skip"] = "stop"
    """A frame that cannot be read ends the run, or is left out, counted and logged."""
    cache: Path | None = None
    """A folder of its own for frames of shards behind a URL, so that they are fetched once."""
    cache_gb: Annotated[float, ranges.QUANTITY] = 100.0
    """At most so many gigabytes (10**9 bytes) are kept there."""

    @field_validator("shards", mode="before")
    @classmethod
    def _one_or_several(cls, value: Any) -> Any:
        if isinstance(value, str | Path):
            return ({"path": str(value)},)
        if not isinstance(value, list | tuple) or not value:
            raise ValueError("give a folder or URL, or a list of them with `path` and `weight`")
        return value

    @field_serializer("shards")
    def _as_written(self, shards: tuple[WeightedShards, ...]) -> Any:
        return shards[0].path if len(shards) == 1 else [part.model_dump() for part in shards]

    @property
    def description(self) -> str:
        """The data sets in one line, for people; no URL's query, which may hold a secret."""
        return ", ".join(
            shown_url(part.path) + (f" x {part.weight:g}" if len(self.shards) > 1 else "")
            for part in self.shards
        )

    @model_validator(mode="after")
    def _lanes_of_one(self) -> "DataSection":
        if self.lanes is not None and len(self.shards) > 1:
            raise ValueError("lanes can be given for one data set, not for a mixture")
        return self


class ModelSection(Section):
    """A stock decoder: Llama's without qk_norm, Qwen3's with it."""

    num_layers: Annotated[int, ranges.LAYERS]
    width: Annotated[int, ranges.SIZE]
    num_heads: Annotated[int, ranges.SIZE]
    num_kv_heads: Annotated[int, ranges.SIZE] | None = None
    """Key and value heads, each shared by num_heads / num_kv_heads query heads. Default: all."""
    mlp_width: Annotated[int, ranges.SIZE] | None = None
    """Default: 8/3 of the width, rounded up to a multiple of 64."""
    qk_norm: bool = True
    tie_embeddings: bool = False
    rope_theta: Annotated[float, ranges.POSITIVE] = 10_000.0
    norm_epsilon: Annotated[float, ranges.POSITIVE] = 1e-5
    zero_output_projections: bool = False
    """Matrices that write to the residual stream start at zero: every block starts as nothing."""
    zero_head: bool = False
    """lm_head starts at zero: the first loss is that of equal guesses. Not with tied embeddings."""
    base_width: Annotated[int, ranges.SIZE] | None = None
    """The width at which learning rates and weight decay were found, if they are to hold at this
    model's width too (muP). Not with tied embeddings."""

    @model_validator(mode="after")
    def _fits(self) -> "ModelSection":
        if self.width % self.num_heads:
            raise ValueError(f"num_heads {self.num_heads} does not divide width {self.width}")
        if self.head_dim % 2:
            raise ValueError(
                f"width / num_heads is {self.head_dim}; rotary positions need an even number"
            )
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.tie_embeddings and (self.base_width is not None or self.zero_head):
            key = "base_width" if self.base_width is not None else "zero_head"
            raise ValueError(
                f"{key} treats lm_head and the embeddings differently, and tie_embeddings makes "
                "them one; leave one of the two out"
            )
        return self

    def resolved(self) -> "ModelSection":
        """The same model with every default spelled out."""
        explicit = {"num_kv_heads": self.kv_heads, "mlp_width": self.hidden_mlp_width}
        return self.model_copy(update=explicit)

    def architecture(self) -> dict[str, Any]:
        """What decides the weights' shapes and what is computed with them."""
        of_learning = {"zero_output_projections", "zero_head", "base_width"}
        return self.resolved().model_dump(mode="json", exclude=of_learning)

    @property
    def head_dim(self) -> int:
        return self.width // self.num_heads

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def hidden_mlp_width(self) -> int:
        return self.mlp_width or -(-self.width * 8 // 3 // 64) * 64


class BatchSection(Section):
    context_tokens: Annotated[int, ranges.CONTEXT]
    """Tokens a row; divides the shards' frames."""
    global_batch_rows: Annotated[int, ranges.SIZE]
    """Rows a step, over all ranks and accumulation."""
    micro_batch_rows: Annotated[int, ranges.SIZE]
    """At most this many rows a forward pass; the largest divisor of a rank's rows is used, and the
    rest is accumulation."""


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """muon: for the matrices of blocks; embeddings, lm_head and norms have AdamW all the same."""
    learning_rate: Annotated[float, ranges.POSITIVE]
    """Peak of the schedule."""
    matrix_learning_rate: Annotated[float, ranges.POSITIVE] | None = None
    """Peak of Muon's, whose updates are as large as AdamW's. Default: learning_rate."""
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"
    """After a linear warmup: along a cosine; the peak, then down a line in the last part (warmup,
    stable, decay); or down a line all the way."""
    decay_fraction: Annotated[float, ranges.SOME_SHARE] = 0.2
    """Of all steps, the last part in which `wsd` goes down."""
    final_learning_rate_ratio: Annotated[float, ranges.SHARE] = 0.1
    """Of the peak, what is left on the last step."""
    warmup_steps: Annotated[int, ranges.COUNT_OR_ZERO] = 0
    beta1: Annotated[float, ranges.SHARE_BELOW_ALL] = 0.9
    beta2: Annotated[float, ranges.SHARE_BELOW_ALL] = 0.95
    epsilon: Annotated[float, ranges.POSITIVE] = 1e-8
    weight_decay: Annotated[float, ranges.NOT_NEGATIVE] = 0.1
    """On matrices only, never on norms."""
    momentum: Annotated[float, ranges.SHARE_BELOW_ALL] = 0.95
    """Muon's."""
    gradient_clip: Annotated[float, ranges.NOT_NEGATIVE] = 1.0
    """Largest norm of the whole gradient; 0 for none."""
    z_loss: Annotated[float, ranges.NOT_NEGATIVE] = 0.0
    """Weight of the squared log of the softmax's denominator, which keeps logits small (1e-4 is
    usual). It is learned from, and left out of the losses that are reported."""

    @model_validator(mode="after")
    def _rate_of_muon(self) -> "OptimizerSection":
        if self.matrix_learning_rate is not None and self.name != "muon":
            raise ValueError("matrix_learning_rate is Muon's; set name to muon, or leave it out")
        return self


class TrainingSection(Section):
    steps: Annotated[int, ranges.COUNT] | None = None
    epochs: Annotated[float, ranges.EPOCHS] | None = None
    seed: Annotated[int, ranges.TRAINING_SEED] = 0
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: bf16 arithmetic with fp32 master weights."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """What the backward pass computes again instead of keeping it. block: each block, a third more
    work; selective: all but what matrix products and attention gave, little more work."""
    compile: bool = False
    """torch.compile: faster steps, after a minute of compiling at the start."""

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingSection":
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give exactly one of steps and epochs")
        return self


class ZeroSection(Section):
    stage: Literal[0, 1, 2, 3] = 2
    """What DeepSpeed shards over the ranks: 0 nothing, 1 optimizer, 2 gradients, 3 weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What is kept in the host's memory: the optimizer's state and fp32 weights (stage 1 to 3), or
    the weights of the model as well (stage 3)."""

    @model_validator(mode="after")
    def _stage_can_offload(self) -> "ZeroSection":
        minimum = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.stage < minimum:
            raise ValueError(
                f"offload {self.offload} needs stage {minimum} or higher, and stage is {self.stage}"
            )
        return self


class HardwareSection(Section):
    device: Literal["auto", "cuda", "cpu"] = "auto"
    processes: Annotated[int, ranges.MANY] | None = None
    """Ranks that `megaback train` starts here. Default: one a GPU, or one on a CPU."""
    attention: Literal["auto", "flash_attn", "sdpa"] = "auto"
    """auto: flash_attn where it is installed and there is a CUDA device, sdpa elsewhere."""
    device_name: str | None = None
    """What `megaback plan` and `submit` take the devices for: h100-80gb, a100-40gb, …"""
    peak_flops: Annotated[float, ranges.POSITIVE] | None = None
    """A device's peak, for the model FLOPs utilization. Default: known for common GPUs."""
    collective_timeout_s: Annotated[float, ranges.SECONDS] = 1800
    """Until the first step is done, a rank that is longer at one thing ends, and so do the others:
    connecting, reading a checkpoint, compiling."""
    step_timeout_s: Annotated[float, ranges.SECONDS] = 300
    """The same from then on: for a micro-batch, a batch of validation, an update, a save."""
    heartbeat_s: Annotated[float, ranges.SECONDS] = 10
    """How often each rank says in the run's folder what it is at."""
    preflight: Annotated[Literal["auto", "on", "strict", "off"], BeforeValidator(_as_word)] = "auto"
    """Check every node before the first step of each start. auto: where there are several ranks;
    strict: also stop for what is otherwise a warning, such as a slow device."""
    memory_check: Annotated[Literal["on", "off"], BeforeValidator(_as_word)] = "on"
    """Refuse a run that needs more memory than its devices, or this machine, have."""


class GuardSection(Section):
    """Steps whose update is skipped. They are counted in the metrics, and the schedule goes on."""

    max_skipped_steps: Annotated[int, ranges.COUNT_OR_ZERO] = 10
    """A run ends after more than so many in a row. A loss or gradient norm that is no number is
    always skipped."""
    spike_nats: Annotated[float, ranges.POSITIVE] | None = None
    """Skip a step whose loss is so much above the median of the last ones'."""
    spike_norm_ratio: Annotated[float, ranges.RATIO_ABOVE_ONE] | None = None
    """Skip a step whose gradient norm is so many times the median of the last ones'."""
    window_steps: Annotated[int, ranges.COUNT] = 100
    """How many last steps those are; before there are so many, nothing is a spike."""


class ValidationSection(Section):
    every_steps: Annotated[int, ranges.COUNT] | None = None
    """The whole val set is measured at the start, at the end, and after every this many steps."""
    patience: Annotated[int, ranges.COUNT] | None = None
    """End the run after so many measurements in a row that are not the best so far. The checkpoint
    of the best one is kept, and named in `checkpoints/best`."""

    @model_validator(mode="after")
    def _patience_has_validations(self) -> "ValidationSection":
        if self.patience is not None and self.every_steps is None:
            raise ValueError("patience counts measurements, so it needs every_steps too")
        return self


class CheckpointSection(Section):
    every_steps: Annotated[int, ranges.COUNT] | None = None
    """Besides the end of the run and a signal."""
    keep_last: Annotated[int, ranges.TWO_OR_MORE] = 3
    keep_every_steps: Annotated[int, ranges.COUNT] | None = None
    """Checkpoints of multiples of this many steps are kept for ever."""
    background: bool = True
    """Write while training goes on, from a copy in the host's memory."""
    copy_to: Address | None = None
    """A second place, a path or URL (s3://bucket/run): each complete checkpoint is copied there in
    the background, under the run's name, and a run that has lost its own goes on from it."""


class LoggingSection(Section):
    every_steps: Annotated[int, ranges.COUNT] = 10
    """Lines on the console; metrics.jsonl has every step."""
    wandb: Annotated[Literal["off", "online", "offline"], BeforeValidator(_as_word)] = "off"
    wandb_project: str = "megaback"
    tensorboard: Annotated[Literal["auto", "on", "off"], BeforeValidator(_as_word)] = "auto"
    """auto: written into the run's folder where tensorboard is installed."""


class Config(Section):
    """A run, as a whole."""

    run: Path
    """Folder of the run: config, metrics, checkpoints, logs."""
    init_from: Path | None = None
    """Whose weights the run starts from: a folder of `megaback convert --to full`, another run, or
    one of its checkpoints."""
    data: DataSection
    model: ModelSection
    batch: BatchSection
    optimizer: OptimizerSection
    training: TrainingSection
    zero: ZeroSection = ZeroSection()
    hardware: HardwareSection = HardwareSection()
    validation: ValidationSection = ValidationSection()
    checkpoint: CheckpointSection = CheckpointSection()
    guard: GuardSection = GuardSection()
    logging: LoggingSection = LoggingSection()

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)


def split_batch(batch: BatchSection, world_size: int) -> tuple[int, int]:
    """Rows of a micro-batch and accumulation steps of each rank.

    Raises BatchError when the ranks cannot share the global batch evenly.
    """
    rows = batch.global_batch_rows
    if rows % world_size:
        nearest = max(world_size, round(rows / world_size) * world_size)
        raise BatchError(
            f"batch.global_batch_rows {rows} is not divisible by {world_size} ranks; "
            f"use {nearest} rows or another number of ranks"
        )
    rank_rows = rows // world_size
    micro_rows = next(
        size
        for size in range(min(batch.micro_batch_rows, rank_rows), 0, -1)
        if rank_rows % size == 0
    )
    return micro_rows, rank_rows // micro_rows
