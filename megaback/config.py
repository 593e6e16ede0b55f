"""Config of a run: one YAML file plus `key.sub=value` overrides, validated before anything starts.

Each field has a docstring. Unknown keys and invalid values are errors. Loads no torch.
"""

from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import field_validator, model_validator

from data_pipeline.common import number_ranges as ranges
from megaback.config_batch import BatchSection, unequal_heads
from megaback.config_data import Base, DataSection
from megaback.config_finetune import FinetuneSection
from megaback.config_operation import (
    CheckpointSection,
    GuardSection,
    HardwareSection,
    LoggingSection,
)
from megaback.config_section import ON_OR_OFF, Section
from megaback.config_validation import ValidationSection

LOSS_CHUNK_TOKENS = 512


class ModelSection(Section):
    """Stock decoder: Llama's architecture without qk_norm, Qwen3's with it."""

    num_layers: Annotated[int, ranges.LAYERS]
    """Number of decoder blocks."""
    width: Annotated[int, ranges.SIZE]
    """Size of the residual stream, in channels (hidden size)."""
    num_heads: Annotated[int, ranges.SIZE]
    """Number of query heads."""
    num_kv_heads: Annotated[int, ranges.SIZE] | None = None
    """Number of key and value heads, each shared by num_heads / num_kv_heads query heads. Default:
    num_heads."""
    head_dim: Annotated[int, ranges.SIZE] | None = None
    """Size of each head, in channels, an even number; queries have num_heads * head_dim channels.
    Default: width / num_heads, which must be a whole number then."""
    mlp_width: Annotated[int, ranges.SIZE] | None = None
    """Size of the MLP's hidden layer, in channels. Default: 8/3 of the width, rounded up to a
    multiple of 64."""
    qk_norm: bool = True
    """RMSNorm of each query and key head, as in Qwen3."""
    tie_embeddings: bool = False
    """Weight tying: lm_head and the input embeddings are one matrix."""
    rope_theta: Annotated[float, ranges.POSITIVE] = 10_000.0
    """Base of the rotary position embeddings' frequencies."""
    rope_scaling_factor: Annotated[float, ranges.POSITIVE] = 1.0
    """Factor by which the scaling of Llama 3.1 divides low rotary frequencies; 1: no scaling."""
    rope_low_frequency_factor: Annotated[float, ranges.POSITIVE] = 1.0
    """Number of periods in rope_original_context_tokens up to which a frequency is divided by the
    whole rope_scaling_factor."""
    rope_high_frequency_factor: Annotated[float, ranges.POSITIVE] = 4.0
    """Number of periods in rope_original_context_tokens from which a frequency is not divided;
    below it, the divisor is interpolated."""
    rope_original_context_tokens: Annotated[int, ranges.CONTEXT] = 8192
    """Context for which a model was trained before its rotary positions were scaled, in tokens."""
    norm_epsilon: Annotated[float, ranges.POSITIVE] = 1e-5
    """Epsilon of every RMSNorm, added to the mean square."""
    zero_output_projections: bool = False
    """Zero initialization of the matrices that write to the residual stream: every block starts as
    the identity."""
    zero_head: bool = False
    """Zero initialization of lm_head: the first loss is that of uniform predictions. Not with tied
    embeddings."""
    base_width: Annotated[int, ranges.SIZE] | None = None
    """Width at which learning rates and weight decay were tuned, in channels, to transfer them to
    this model's width (muP), if num_heads * head_dim grew with the width. Default: no transfer.
    Not with tied embeddings."""

    @model_validator(mode="after")
    def _fits(self) -> "ModelSection":
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"num_heads {self.num_heads} does not divide width {self.width}; change one of "
                "them, or set head_dim"
            )
        if self.head_size % 2:
            key = "width / num_heads" if self.head_dim is None else "head_dim"
            raise ValueError(f"{key} is {self.head_size}; rotary positions need an even number")
        if self.num_heads % self.kv_heads:
            raise ValueError(
                f"num_kv_heads {self.kv_heads} does not divide num_heads {self.num_heads}"
            )
        if self.rope_low_frequency_factor >= self.rope_high_frequency_factor:
            raise ValueError(
                f"rope_low_frequency_factor {self.rope_low_frequency_factor:g} is not below "
                f"rope_high_frequency_factor {self.rope_high_frequency_factor:g}"
            )
        if self.tie_embeddings and (self.base_width is not None or self.zero_head):
            key = "base_width" if self.base_width is not None else "zero_head"
            raise ValueError(
                f"{key} treats lm_head and the embeddings differently, but tie_embeddings makes "
                "them one matrix; remove one of the two keys"
            )
        return self

    def resolved(self) -> "ModelSection":
        """The same model with all defaults explicit."""
        explicit = {
            "num_kv_heads": self.kv_heads,
            "head_dim": self.head_size,
            "mlp_width": self.hidden_mlp_width,
        }
        return self.model_copy(update=explicit)

    def architecture(self) -> dict[str, Any]:
        """Fields that determine the weights' shapes and the forward pass."""
        of_learning = {"zero_output_projections", "zero_head", "base_width"}
        return self.resolved().model_dump(mode="json", exclude=of_learning)

    @property
    def head_size(self) -> int:
        """Channels of a head."""
        return self.head_dim or self.width // self.num_heads

    @property
    def query_width(self) -> int:
        """Channels of all query heads."""
        return self.num_heads * self.head_size

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def kv_width(self) -> int:
        """Channels of all key heads."""
        return self.kv_heads * self.head_size

    @property
    def hidden_mlp_width(self) -> int:
        return self.mlp_width or -(-self.width * 8 // 3 // 64) * 64


class OptimizerSection(Section):
    name: Literal["adamw", "muon"] = "adamw"
    """Optimizer. muon: Muon for the matrices of blocks, AdamW for embeddings, lm_head and norms."""
    learning_rate: Annotated[float, ranges.POSITIVE]
    """Peak learning rate of the schedule."""
    matrix_learning_rate: Annotated[float, ranges.POSITIVE] | None = None
    """Peak learning rate of Muon, whose updates are as large as AdamW's. Default: learning_rate."""
    schedule: Literal["cosine", "wsd", "linear"] = "cosine"
    """Learning-rate schedule after the linear warmup. cosine: cosine decay; wsd: the peak, then
    linear decay in the last phase (warmup, stable, decay); linear: linear decay."""
    decay_fraction: Annotated[float, ranges.SOME_SHARE] = 0.2
    """Fraction of all steps in the last (decay) phase of `wsd`."""
    decay_at: tuple[Annotated[float, ranges.PLANNED_TOKENS], ...] | None = None
    """Horizons of `wsd`, in tokens: at each, a branch of the run ends with a model whose rate has
    decayed, while the run itself stays at the peak. Takes the place of training.steps. Default:
    none."""
    final_learning_rate_ratio: Annotated[float, ranges.SHARE] = 0.1
    """Ratio of the last step's learning rate to the peak."""
    warmup_steps: Annotated[int, ranges.COUNT_OR_ZERO] = 0
    """Length of the linear warmup, in steps."""
    beta1: Annotated[float, ranges.SHARE_BELOW_ALL] = 0.9
    """Decay factor per step of AdamW's first moment."""
    beta2: Annotated[float, ranges.SHARE_BELOW_ALL] = 0.95
    """Decay factor per step of AdamW's second moment."""
    epsilon: Annotated[float, ranges.POSITIVE] = 1e-8
    """Epsilon of AdamW, added to the denominator of an update."""
    weight_decay: Annotated[float, ranges.NOT_NEGATIVE] = 0.1
    """Coefficient of weight decay, on matrices only, never on norms."""
    momentum: Annotated[float, ranges.SHARE_BELOW_ALL] = 0.95
    """Decay factor per step of Muon's momentum."""
    gradient_clip: Annotated[float, ranges.NOT_NEGATIVE] = 1.0
    """Maximum norm of the whole gradient, which is clipped to it; 0: no clipping."""
    z_loss: Annotated[float, ranges.NOT_NEGATIVE] = 0.0
    """Coefficient of the squared log of the softmax's denominator, which keeps logits small (1e-4
    is usual). Part of the objective, but not of the losses that are reported."""

    @model_validator(mode="after")
    def _horizons_of_wsd(self) -> "OptimizerSection":
        if self.decay_at is None:
            return self
        if self.schedule != "wsd":
            raise ValueError(
                f"decay_at is for schedule wsd only, and it is {self.schedule}; set it to wsd or "
                "remove decay_at"
            )
        if not self.decay_at or any(after <= before for before, after in pairwise(self.decay_at)):
            raise ValueError("decay_at must be one or more numbers of tokens, each above the last")
        return self

    def decay_steps(self, total_steps: int) -> int:
        """Number of steps in the decay phase of `wsd`."""
        return max(round(self.decay_fraction * total_steps), 1)

    @model_validator(mode="after")
    def _rate_of_muon(self) -> "OptimizerSection":
        if self.matrix_learning_rate is not None and self.name != "muon":
            raise ValueError("matrix_learning_rate is for Muon only; set name to muon or remove it")
        return self


class TrainingSection(Section):
    steps: Annotated[int, ranges.COUNT] | None = None
    """Length of the run, in steps. Exactly one of steps and epochs is given, or
    optimizer.decay_at."""
    epochs: Annotated[float, ranges.EPOCHS] | None = None
    """Length of the run, in passes over the train set; fractions are allowed."""
    seed: Annotated[int, ranges.TRAINING_SEED] = 0
    """Seed of the initial weights and of the data order."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Precision of training. bf16: bf16 arithmetic with fp32 master weights; fp32: all in fp32."""
    activation_checkpointing: Literal["none", "block", "selective"] = "none"
    """Activations that the backward pass recomputes instead of storing. block: each block's, a
    third more compute; selective: all but the results of matrix products and attention, little more
    compute."""
    loss_chunk_tokens: Annotated[int, ranges.SIZE] = LOSS_CHUNK_TOKENS
    """Length of the chunks in which the loss is computed, in tokens. Shorter ones need less memory
    for logits, and more time. Changes no loss by more than rounding."""
    compile: Annotated[Literal["auto", "on", "off"], ON_OR_OFF] = "auto"
    """Compilation with torch.compile: faster steps, after a minute of compiling at the start. auto:
    on with a GPU, off on a CPU."""
    deterministic: bool = True
    """Deterministic algorithms on GPUs, with which a resumed run repeats an uninterrupted one bit
    for bit. They make the backward pass of attention slower. A CPU always has them."""
    memory_history: bool = False
    """History of a GPU's allocations, for the snapshot of a rank that is out of memory."""

    def may_compile_on(self, is_cpu: bool) -> bool:
        """Whether training on a CPU, or on a GPU, may be compiled."""
        return self.compile == "on" or (self.compile == "auto" and not is_cpu)

    @model_validator(mode="after")
    def _one_length(self) -> "TrainingSection":
        if self.steps is not None and self.epochs is not None:
            raise ValueError("give exactly one of steps and epochs")
        return self


class ZeroSection(Section):
    stage: Literal[0, 1, 2, 3] = 2
    """Stage of ZeRO: what DeepSpeed shards over the ranks. 0: nothing; 1: the optimizer state; 2:
    gradients too; 3: weights too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """State held in host memory instead of on the device. optimizer: the optimizer state and fp32
    weights (stages 1 to 3); parameters: the model's weights as well (stage 3)."""
    gradient_precision: Literal["bf16", "fp32"] = "bf16"
    """Precision in which a run in bf16 accumulates gradients at stages 1 to 3, and adds them over
    the ranks; other runs do so in fp32. fp32: twice the traffic of gradients, and at stage 1 twice
    their memory."""
    reduce_once: bool = False
    """Addition of gradients over the ranks once per step at stages 2 and 3, as at the others,
    instead of after every micro-batch: less traffic, and a whole gradient in every rank's
    memory."""
    reduction: Literal["all_reduce", "reduce"] = "all_reduce"
    """Collective by which stages 1 and 2 add gradients over the ranks. all_reduce: every rank gets
    all sums; reduce: each gets its own, for half the traffic in many smaller calls."""
    overlap_communication: bool | None = None
    """Communication in a CUDA stream of its own, during the backward pass: of gradients, and at
    stage 3 of weights. Default: at stage 3."""
    hierarchical: bool = False
    """Sharding by node, for less traffic between nodes. Stages 1 and 2: state is sharded over the
    ranks of one node, as in FSDP's hybrid sharding, and every node has all of it; nodes exchange
    gradients once per step. Stage 3: every node also keeps a copy of the weights, from which all
    passes but the first of a step gather them (DeepSpeed's hpZ). Changes nothing on one node."""

    @property
    def overlaps_communication(self) -> bool:
        if self.overlap_communication is None:
            return self.stage == 3
        return self.overlap_communication

    @model_validator(mode="after")
    def _stage_can_offload(self) -> "ZeroSection":
        minimum = {"none": 0, "optimizer": 1, "parameters": 3}[self.offload]
        if self.stage < minimum:
            raise ValueError(
                f"offload {self.offload} needs stage {minimum} or higher, and stage is {self.stage}"
            )
        return self

    @model_validator(mode="after")
    def _stage_is_hierarchical(self) -> "ZeroSection":
        if self.hierarchical and self.stage == 0:
            raise ValueError(
                "hierarchical needs stage 1 or higher, and stage 0 shards nothing; set a stage or "
                "remove hierarchical"
            )
        if self.hierarchical and self.offload != "none":
            raise ValueError(
                f"hierarchical and offload {self.offload} exclude each other; remove one of the two"
            )
        return self


Kept = Literal["weights", "optimizer", "schedule", "data"]
ALL_KEPT: tuple[Kept, ...] = get_args(Kept)


class Config(Section):
    """Config of a whole run."""

    run: Path
    """Folder of the run: config, metrics, checkpoints, logs."""
    init_from: Base | None = None
    """Source of the initial weights: a folder of `megaback convert --to full`, another run, one of
    its checkpoints, or their copies in checkpoint.copy_to. Default: random weights."""
    branch_from: Base | None = None
    """Checkpoint from which the run continues as a branch, or a run: its newest one. Or the path or
    URL of copies in checkpoint.copy_to. Used at the first start only. Default: none."""
    keep: tuple[Kept, ...] = ALL_KEPT
    """State that a branch continues. weights: always; optimizer: its moments; schedule: the step,
    and with it the learning rate; data: the order, after the rows already read."""
    data: DataSection
    """Data sets, and how they are read."""
    model: ModelSection
    """Shape and initialization of the model."""
    batch: BatchSection
    """Sizes of rows and batches."""
    optimizer: OptimizerSection
    """Optimizer, learning-rate schedule and clipping."""
    training: TrainingSection
    """Length, precision and seed of training."""
    finetune: FinetuneSection = FinetuneSection()
    """Fine-tuning of few weights: LoRA."""
    zero: ZeroSection = ZeroSection()
    """Sharding and offload of training state (DeepSpeed ZeRO)."""
    hardware: HardwareSection = HardwareSection()
    """Devices, ranks, timeouts and checks of the machine."""
    validation: ValidationSection = ValidationSection()
    """Measurements on the val set, and early stopping."""
    checkpoint: CheckpointSection = CheckpointSection()
    """Checkpoints: when they are written, kept and copied."""
    guard: GuardSection = GuardSection()
    """Steps whose update is skipped."""
    logging: LoggingSection = LoggingSection()
    """Console and trackers."""

    @field_validator("keep")
    @classmethod
    def _in_order(cls, keep: tuple[Kept, ...]) -> tuple[Kept, ...]:
        return tuple(part for part in ALL_KEPT if part == "weights" or part in keep)

    @model_validator(mode="after")
    def _one_beginning(self) -> "Config":
        if self.branch_from is not None and self.init_from is not None:
            raise ValueError(
                "branch_from and init_from exclude each other; set init_from=null to continue a "
                "checkpoint, or remove branch_from to start from weights alone"
            )
        if self.branch_from is None and self.keep != ALL_KEPT:
            raise ValueError("keep is for branches only; set branch_from or remove it")
        return self

    @model_validator(mode="after")
    def _base_of_lora(self) -> "Config":
        if self.finetune.adapters is None:
            return self
        if self.init_from is None and self.branch_from is None:
            raise ValueError(
                "finetune.lora trains updates of a model's weights, so it needs init_from too; set "
                "it or remove finetune.lora"
            )
        if self.optimizer.name != "adamw":
            raise ValueError(
                "optimizer.name muon is for whole matrices, and finetune.lora trains factors of "
                "their updates; set it to adamw"
            )
        return self

    @model_validator(mode="after")
    def _one_end(self) -> "Config":
        if self.optimizer.decay_at is None:
            if self.training.steps is None and self.training.epochs is None:
                raise ValueError("training: give exactly one of steps and epochs")
            return self
        for key, is_set in (
            ("training.epochs", self.training.epochs is not None),
            ("branch_from", self.branch_from is not None),
            ("validation.patience", self.validation.patience is not None),
            ("data.weight_positions fraction", self.data.depends_on_length),
        ):
            if is_set:
                raise ValueError(
                    f"optimizer.decay_at and {key} exclude each other, as the horizons are the "
                    "lengths of the run; remove one of the two"
                )
        return self

    @model_validator(mode="after")
    def _samples_of_both(self) -> "Config":
        if self.validation.direction is not None and not self.data.is_both:
            raise ValueError(
                "validation.direction is for models of both directions only; set "
                "data.direction to both or remove it"
            )
        return self

    @model_validator(mode="after")
    def _shared_rows(self) -> "Config":
        problem = unequal_heads(self.batch, self.model.num_heads, self.model.kv_heads)
        if problem is not None:
            raise ValueError(problem)
        if self.batch.sequence_parallel > 1 and self.data.on_bad_frame == "skip":
            raise ValueError(
                "batch.sequence_parallel and data.on_bad_frame skip exclude each other, as a frame "
                "that only one of the ranks that share a row cannot read would give them different "
                "rows; set data.on_bad_frame to stop"
            )
        return self

    @property
    def has_fp32_accumulators(self) -> bool:
        """Whether gradients are in fp32 besides weights in bf16."""
        has_bf16_weights = self.training.precision == "bf16" and self.zero.stage > 0
        return has_bf16_weights and self.zero.gradient_precision == "fp32"

    def reduces_once(self, accumulation_steps: int) -> bool:
        """Whether reductions of a step's micro-batches are postponed to its end."""
        return self.zero.reduce_once and self.zero.stage >= 2 and accumulation_steps > 1

    def undivided(self) -> "Config":
        """The same rows and steps, for a process that reads all of them by itself."""
        batch = self.batch.model_copy(update={"sequence_parallel": 1})
        return self.model_copy(update={"batch": batch})

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)
