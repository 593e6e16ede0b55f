"""Memory estimate of a rank, by component, at each peak of a training step. Loads no torch.

It covers the allocations of DeepSpeed's ZeRO (Rajbhandari et al., 2020) and of our optimizers, as
listed in docs/planning.md; `benchmarks/memory.py` compares it with real runs. Memory peaks at the
start of the backward pass, in the final norm, in its first and last block, at its end, and in the
optimizer. The whole model at the start and the copy of a checkpoint are in host memory, on a CPU
the rank's own.
"""

from dataclasses import dataclass, replace

from megaback.config import ModelSection
from megaback.config_finetune import LoraSection
from megaback.planning.activation_memory import (
    Arithmetic,
    Attention,
    activations_of,
    loss_memory,
)
from megaback.planning.adapters import adapter_shapes
from megaback.planning.flops import ModelSize
from megaback.planning.gradient_buffer import kept_elements
from megaback.planning.gradient_memory import GradientMemory, GradientSetting, gradient_memory
from megaback.planning.matrix_shares import matrices_of, matrix_share, matrix_shares
from megaback.planning.muon_memory import exchange_bytes, orthogonal_elements

_MIN_BUCKET_ELEMENTS = 1_000_000
_MAX_BUCKET_ELEMENTS = 500_000_000
_GATHERED_ELEMENTS = 1_000_000_000
"""Maximum weights that ZeRO 3 keeps gathered: DeepSpeed's stage3_max_live_parameters."""
GROUP_ELEMENTS = 1_000_000_000
"""Elements of a rank that ZeRO 3 updates at a time: DeepSpeed's sub_group_size."""
WHOLE_REDUCED_ELEMENTS = 500_000_000
"""Elements that stage 0 reduces at a time."""

CUDA_CONTEXT_BYTES = 1.5e9
"""CUDA context, kernels and NCCL buffers. Not measured: docs/unverified.md."""
CUDA_FRAGMENTATION = 0.05
"""Fraction of all other memory lost to fragmentation in PyTorch's allocator. Not measured."""


def bucket_elements(num_parameters: int) -> int:
    """Size of a gradient bucket, in elements.

    DeepSpeed's default suits billions of weights; for small models it costs memory and time.
    """
    return min(max(num_parameters // 8, _MIN_BUCKET_ELEMENTS), _MAX_BUCKET_ELEMENTS)


@dataclass(frozen=True)
class Setting:
    """Settings that determine a rank's memory."""

    shape: ModelSection
    vocab_size: int
    micro_batch_tokens: int
    """Tokens of a rank."""
    accumulates: bool
    """Whether a step has several micro-batches."""
    ranks: int
    ranks_per_node: int
    stage: int
    precision: str
    checkpointing: str
    optimizer: str
    offload: str
    loss_chunk_tokens: int
    attention: Attention
    saves_while_training: bool
    is_cpu: bool
    has_fp32_accumulators: bool = False
    """Whether gradients are in fp32 besides weights in bf16."""
    reduces_once: bool = False
    """Whether reductions at stages 2 and 3 are postponed to the step's end."""
    overlaps: bool = False
    """Whether reductions overlap with the backward pass."""
    is_hierarchical: bool = False
    """Whether sharding is by node."""
    sequence_parallel: int = 1
    lora: LoraSection | None = None
    rank: int | None = None
    """None: the rank that uses most."""

    @property
    def shard_ranks(self) -> int:
        """Ranks that share one copy of the optimizer state."""
        by_node = self.is_hierarchical and self.stage in (1, 2)
        return min(self.ranks, self.ranks_per_node) if by_node else self.ranks

    @property
    def shard_rank(self) -> int | None:
        """Rank among these; None: the rank that uses most."""
        return None if self.rank is None else self.rank % self.shard_ranks

    @property
    def size(self) -> ModelSize:
        return ModelSize.of(self.shape, self.vocab_size, self.lora)

    @property
    def arithmetic(self) -> Arithmetic:
        if self.precision == "fp32":
            return "fp32"
        return "bf16" if self.stage else "autocast"

    @property
    def weight_bytes(self) -> int:
        return 2 if self.arithmetic == "bf16" else 4

    @property
    def accumulator_bytes(self) -> int:
        return 4 if self.has_fp32_accumulators else self.weight_bytes

    def gradients(self, size: ModelSize) -> GradientMemory:
        """Memory of gradients, besides those that stage 3 always holds."""
        setting = GradientSetting(
            stage=self.stage,
            weight_bytes=self.weight_bytes,
            accumulator_bytes=self.accumulator_bytes,
            accumulates=self.accumulates,
            reduces_once=self.reduces_once,
            overlaps=self.overlaps,
            is_offloaded=_is_offloaded(self),
            ranks=self.shard_ranks,
        )
        kept = kept_elements(
            self.shape,
            self.vocab_size,
            self.optimizer,
            self.shard_ranks,
            self.shard_rank,
            self.lora,
        )
        matrix, bucket = _largest_trained_matrix(self), bucket_elements(size.trained)
        return gradient_memory(setting, size.trained, kept, bucket, matrix)


@dataclass(frozen=True)
class Parts:
    """Memory of a rank at one moment, in bytes by component."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    """Optimizer state, and fp32 master weights if the weights have another type."""
    activations: float = 0.0
    logits: float = 0.0
    buckets: float = 0.0
    update: float = 0.0
    """Additional bytes of an update, or of the start."""
    copy: float = 0.0
    """Copy of the checkpoint that is being written, on a CPU."""
    reserve: float = 0.0
    """Reserve for the CUDA context and fragmentation, on a GPU."""

    @property
    def total(self) -> float:
        return float(sum(vars(self).values()))


@dataclass(frozen=True)
class RankMemory:
    """Peak memory of a rank, and host memory of its node."""

    moment: str
    parts: Parts
    host_bytes_per_node: float
    """Offloaded state and copies of checkpoints; 0 on CPUs, where they are in `parts`."""
    host_bytes_at_start_per_node: float
    """Whole models in fp32, before they are moved to the devices; 0 on CPUs."""
    moments: dict[str, float]
    """Bytes at every moment."""
    allocated: dict[str, float]
    """The same without a GPU's reserve."""


def rank_memory(setting: Setting) -> RankMemory:
    """Memory of a rank, by default of the one that uses most."""
    size = setting.size
    moments = {**_step_moments(setting, size), "update": _update(setting, size)}
    copy = _checkpoint_bytes(size, setting.optimizer) / setting.ranks
    start = _start(setting, size)
    host = copy + _offloaded(setting, size)
    if setting.is_cpu:
        if setting.saves_while_training:
            moments = {name: replace(parts, copy=copy) for name, parts in moments.items()}
        moments["saving"] = replace(_resident(setting, size), copy=copy)
        moments["start"] = start
    allocated = {name: parts.total for name, parts in moments.items()}
    if not setting.is_cpu:
        moments = {name: _with_reserve(parts) for name, parts in moments.items()}
    peak = max(moments, key=lambda name: moments[name].total)
    return RankMemory(
        peak,
        moments[peak],
        0.0 if setting.is_cpu else host * setting.ranks_per_node,
        0.0 if setting.is_cpu else start.total * setting.ranks_per_node,
        {name: parts.total for name, parts in moments.items()},
        allocated,
    )


def checkpoint_bytes(
    shape: ModelSection, vocab_size: int, optimizer: str, lora: LoraSection | None = None
) -> float:
    """Size of a checkpoint on disk: fp32 weights and optimizer state.

    Without frozen weights, of which all checkpoints have one file.
    """
    return _checkpoint_bytes(ModelSize.of(shape, vocab_size, lora), optimizer)


def _checkpoint_bytes(size: ModelSize, optimizer: str) -> float:
    return 4 * size.trained + _state_bytes(size, optimizer)


def _state_bytes(size: ModelSize, optimizer: str) -> float:
    """Two moments per weight, or one momentum for the matrices that Muon updates."""
    return 8 * size.trained - (4 * size.matrices if optimizer == "muon" else 0)


def _with_reserve(parts: Parts) -> Parts:
    return replace(parts, reserve=CUDA_CONTEXT_BYTES + CUDA_FRAGMENTATION * parts.total)


def _is_offloaded(setting: Setting) -> bool:
    return setting.offload != "none" and not setting.is_cpu


def _offloaded(setting: Setting, size: ModelSize) -> float:
    """Host memory of a rank: optimizer state, fp32 weights and gradients, and weights to send."""
    if not _is_offloaded(setting):
        return 0.0
    states = 4 * size.trained + _state_bytes(size, setting.optimizer) + 4 * size.trained
    if setting.stage < 3 or setting.offload == "parameters":
        states += setting.weight_bytes * size.total
    return states / setting.ranks


def _resident(setting: Setting, size: ModelSize) -> Parts:
    """Memory held throughout training, from the first update on."""
    total, ranks, stage = size.total, setting.shard_ranks, setting.stage
    weights = float(setting.weight_bytes * total)
    optimizer = _state_bytes(size, setting.optimizer)
    gradients = buckets = 0.0
    if setting.arithmetic == "autocast":  # bf16 copies of trained matrices, which stay allocated
        weights += 2 * (size.adapters or size.matrices)
    if stage:
        optimizer = (optimizer + 4 * size.trained) / ranks
    if stage == 3:
        weights /= ranks
        gradients = setting.accumulator_bytes * size.trained / ranks
        buckets = setting.accumulator_bytes * bucket_elements(size.trained)
    if _is_offloaded(setting):
        optimizer = 0.0
        gradients = 0.0 if stage == 3 else gradients
        if setting.offload == "parameters":
            weights = 0.0
    return Parts(weights=weights, gradients=gradients, optimizer=optimizer, buckets=buckets)


def _stepping(setting: Setting, size: ModelSize) -> Parts:
    """Memory held during a step, with the node's copy of the weights at stage 3."""
    resident = _resident(setting, size)
    is_copied = setting.is_hierarchical and setting.stage == 3
    if not is_copied or setting.ranks <= setting.ranks_per_node:
        return resident
    copy = setting.weight_bytes * size.total / setting.ranks_per_node
    return replace(resident, weights=resident.weights + copy)


def _start(setting: Setting, size: ModelSize) -> Parts:
    """Peak of the start, where the host's memory has the whole model in fp32."""
    weights = 4.0 * size.total
    work = 4.0 * _largest_parameter(setting, size)  # random numbers
    if setting.is_cpu and setting.stage in (1, 2) and setting.precision == "fp32":
        # ZeRO copies each group of parameters into a flat tensor.
        is_muon = setting.optimizer == "muon"
        rest = size.total - size.matrices
        work = max(work, 4.0 * (max(size.matrices, rest) if is_muon else size.trained))
    return Parts(weights=weights, update=work)


def _largest_parameter(setting: Setting, size: ModelSize) -> int:
    """Elements of the largest parameter."""
    return max(size.embedding, _largest_matrix(setting.shape))


def _largest_matrix(shape: ModelSection) -> int:
    """Elements of the largest matrix."""
    return max(rows * columns for rows, columns in matrices_of(shape))


def _largest_trained_matrix(setting: Setting) -> int:
    """Elements of the largest matrix that has a gradient, or of LoRA's largest factor."""
    if setting.lora is None:
        return _largest_matrix(setting.shape)
    factors = adapter_shapes(setting.shape, setting.lora).values()
    return max(rows * columns for rows, columns in factors)


def _step_moments(setting: Setting, size: ModelSize) -> dict[str, Parts]:
    """Peaks of the forward and backward pass of a step's last micro-batch."""
    total, ranks, stage = size.total, setting.ranks, setting.stage
    tokens, layers = setting.micro_batch_tokens, setting.shape.num_layers
    kept = activations_of(
        setting.shape,
        setting.arithmetic,
        setting.checkpointing,
        setting.attention,
        setting.sequence_parallel,
        setting.lora,
        saves_inputs=stage == 3,  # as DeepSpeed's memory_efficient_linear does
    )
    loss = loss_memory(
        setting.shape,
        setting.vocab_size,
        setting.arithmetic,
        tokens,
        setting.loss_chunk_tokens,
    )
    resident = _stepping(setting, size)
    weights = resident.weights
    if stage == 3 and (ranks > 1 or setting.offload == "parameters"):
        weights += setting.weight_bytes * min(total, _GATHERED_ELEMENTS)
    if setting.arithmetic == "autocast" and size.adapters:
        # bf16 copies of frozen matrices, which blocks save for their backward pass.
        weights += 2 * size.matrices / (layers if setting.checkpointing == "block" else 1)
    working = replace(resident, weights=weights)
    held = setting.gradients(size)
    head = 0.0 if stage >= 2 else setting.accumulator_bytes * size.head_gradient
    first = max(held.earlier, head)
    if stage == 2 and not setting.reduces_once:
        # The buffer of a rank's gradients is allocated for the first one. On a CPU, its memory is
        # used as it is filled: by the head and a bucket here. fp32 gradients begin as zeros.
        filled = setting.weight_bytes * (bucket_elements(size.trained) + size.head_gradient)
        is_filled = setting.is_cpu and not setting.has_fp32_accumulators
        first = held.earlier + min(held.last - held.earlier, filled if is_filled else held.last)
    # A matrix's gradient, before it is copied into the bucket. (At stage 1, the bucket's gradients
    # are among all gradients at the end.)
    matrix = _largest_trained_matrix(setting)
    is_copied = stage == 1 or (stage == 2 and not setting.reduces_once)
    copied = float(setting.weight_bytes * matrix) if is_copied else 0.0
    copied_last = copied if stage == 2 else 0.0
    # Gradients of untied embeddings follow those of the last block.
    share = size.embedding / total if size.head and not size.adapters else 0.0
    embedding = (held.last - held.earlier) * share

    def moment(blocks: int, gradients: float, buckets: float, work: float) -> Parts:
        return replace(
            working,
            gradients=working.gradients + gradients,
            buckets=working.buckets + buckets,
            activations=tokens * (blocks * kept.block + work),
        )

    reduced = 4.0 * min(size.trained, WHOLE_REDUCED_ELEMENTS) if stage == 0 and ranks > 1 else 0.0
    weight_gradient = loss.weight_gradient if size.head_gradient else 0.0
    return {
        "loss": replace(
            moment(layers, held.earlier + weight_gradient, 0, kept.rest + loss.hidden),
            logits=loss.chunk,
        ),
        "final norm": moment(layers, first, held.bucket, kept.norm_work),
        "first block": moment(layers, first, held.bucket + copied, kept.block_work),
        "last block": moment(
            1,
            max(held.last - embedding, held.earlier),
            held.bucket + copied_last,
            kept.block_work,
        ),
        "reduction": replace(
            resident,
            gradients=resident.gradients + held.last + held.reduced,
            buckets=resident.buckets + held.bucket + reduced,
        ),
    }


def _update(setting: Setting, size: ModelSize) -> Parts:
    """Peak of the optimizer's update, which processes parameter groups in sequence."""
    resident, stage, ranks = _stepping(setting, size), setting.stage, setting.shard_ranks
    held, is_muon = setting.gradients(size), setting.optimizer == "muon"
    rest = size.total - size.matrices
    if stage == 0:
        work = _whole_work(setting, size) if is_muon else 0.0
        return replace(resident, gradients=4.0 * size.trained, update=work)
    if _is_offloaded(setting):  # matrices are orthogonalized on the device
        work = _muon_work(setting) if is_muon else 0.0
        return replace(resident, gradients=resident.gradients + held.averaged, update=work)
    group = (max(size.matrices, rest) if is_muon else size.trained) / ranks
    if stage == 3:
        group = min(group, GROUP_ELEMENTS)
    flat = held.update_bytes * group
    # Before, the norm is computed in fp64, of one parameter's part at a time.
    largest = _largest_trained_matrix(setting)
    if not size.adapters:
        largest = max(largest, size.embedding)
    norm = 0.0 if stage == 3 else 8.0 * min(group, largest)
    plain = replace(resident, gradients=resident.gradients + held.averaged, update=max(flat, norm))
    if not is_muon:
        return plain
    part = min(GROUP_ELEMENTS * ranks / size.matrices, 1.0) if stage == 3 else 1.0
    work = part * (8.0 * size.matrices / ranks + _muon_work(setting))
    orthogonal = replace(resident, update=work)
    return max(plain, orthogonal, key=lambda parts: parts.total)


def _whole_work(setting: Setting, size: ModelSize) -> float:
    """Bytes of Muon's update at stage 0, where every rank has whole matrices."""
    elements = size.matrices + orthogonal_elements(matrices_of(setting.shape))
    return _matrix_bytes(setting) * elements


def _muon_work(setting: Setting) -> float:
    """Bytes of Muon's update at stages 1 to 3, besides gradient and momentum."""
    shape, ranks, stage = setting.shape, setting.shard_ranks, setting.stage
    if setting.shard_rank is None:
        shares = matrix_shares(shape, ranks, stage)
    else:
        shares = (matrix_share(shape, ranks, stage, setting.shard_rank),)
    return max(exchange_bytes(share, ranks, _matrix_bytes(setting)) for share in shares)


def _matrix_bytes(setting: Setting) -> int:
    """Bytes per element of the matrices that are orthogonalized."""
    return 4 if setting.precision == "fp32" else 2
