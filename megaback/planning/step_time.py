"""Time of a training step on GPUs, by part, as a roofline with stated assumptions. Loads no torch.

Arithmetic: matrix products, each bound by the peak or by the memory (Williams et al., "Roofline",
2009), attention, and Muon's orthogonalization. Memory-bound work: norms, rotary positions, SwiGLU,
residuals, losses, sums of gradients and the update. Network: what neither pass hides. Host: kernels
that are launched more slowly than they run, waits, and offloaded work. What is assumed of rates is
in `planning.rates`; `benchmarks/published_speeds.py` compares the sum with published runs.
"""

from dataclasses import dataclass
from math import ceil, log2

from megaback.config import ModelSection
from megaback.planning.adapters import adapter_shapes
from megaback.planning.collectives import StepCalls
from megaback.planning.devices import Device
from megaback.planning.flops import ModelSize, orthogonalization_flops
from megaback.planning.matrix_shares import MatrixShape, matrices_of, matrix_share, matrix_shares
from megaback.planning.memory import Setting
from megaback.planning.network import Traffic, TrafficTime
from megaback.planning.rates import assumed, attention_share, matmul_share

_LOSS_PASSES = 16
"""Bytes moved per logit: bf16 written and read, fp32 written, read twice, and the gradient."""
_UPDATE_BYTES = 44
"""Bytes moved per parameter of an update: moments, master weight, gradient, norm and clipping."""
_HOST_UPDATE_BYTES = 28
_SUM_ACCESSES = 5
"""Reads and writes of a gradient that is added to a sum and copied to a bucket."""
_KERNELS = {True: (12, 25, 10), False: (40, 80, 25)}
"""Kernels of a block's forward and backward pass, and of a chunk of the loss, by compilation."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of a step, by part."""

    arithmetic_s: float
    memory_s: float
    """Work that the memory's bandwidth limits."""
    network_s: float
    """Communication that nothing hides."""
    host_s: float
    """Time in which the device waits for the host."""
    hidden_network_s: float
    """Communication during the forward and backward pass; not part of the total."""

    @property
    def total_s(self) -> float:
        return self.arithmetic_s + self.memory_s + self.network_s + self.host_s


@dataclass(frozen=True, kw_only=True)
class TimedStep:
    """Settings that determine a step's time."""

    setting: Setting
    traffic: Traffic
    calls: StepCalls
    nodes: int
    micro_batches: int
    attended_tokens: float
    is_compiled: bool
    peak_flops: float

    @property
    def size(self) -> ModelSize:
        return self.setting.size


@dataclass(frozen=True)
class _Work:
    """Seconds of computing."""

    arithmetic_s: float
    memory_s: float

    @property
    def total_s(self) -> float:
        return self.arithmetic_s + self.memory_s


def step_time(step: TimedStep, device: Device) -> StepTime | None:
    """Time of a step; None if the bandwidth of the device's memory is unknown."""
    if device.memory_rate is None:
        return None
    memory_rate = device.memory_rate * assumed("MEMORY_SHARE")
    forward, backward = _passes(step, device, memory_rate)
    update = _update(step, device, memory_rate)
    exposed, hidden = _network(step, device, forward.total_s, backward.total_s)
    count = step.micro_batches
    computing = forward.total_s + backward.total_s
    launches = max(_launches_s(step) - computing, 0.0)
    return StepTime(
        arithmetic_s=count * (forward.arithmetic_s + backward.arithmetic_s) + update.arithmetic_s,
        memory_s=count * (forward.memory_s + backward.memory_s) + update.memory_s,
        network_s=exposed,
        host_s=count * launches + assumed("STEP_HOST_S") + _offload_s(step),
        hidden_network_s=hidden,
    )


def _passes(step: TimedStep, device: Device, memory_rate: float) -> tuple[_Work, _Work]:
    """Forward and backward pass of a micro-batch; the former has the loss and its gradient."""
    setting, shape, size = step.setting, step.setting.shape, step.size
    tokens, layers = setting.micro_batch_tokens, shape.num_layers
    value_bytes = 4 if setting.precision == "fp32" else 2
    peak = step.peak_flops * matmul_share(device)

    def product_s(rows: float, inner: int, columns: int) -> float:
        moved = value_bytes * (rows * inner + rows * columns + inner * columns)
        return max(2.0 * rows * inner * columns / peak, moved / memory_rate)

    products = sum(
        product_s(tokens, inner, columns)
        for columns, inner in matrices_of(shape.model_copy(update={"num_layers": 1}))
    )
    attention_flops = 4.0 * shape.query_width * step.attended_tokens * tokens
    attention = attention_flops / (step.peak_flops * attention_share(device))
    once = layers * (products + attention)
    # Of frozen weights, no gradient is computed.
    back = layers * ((1 if setting.lora else 2) * products + 2 * attention)
    factors = adapter_shapes(shape, setting.lora).values() if setting.lora else ()
    adapters = sum(product_s(tokens, inner, columns) for columns, inner in factors)

    chunk = min(setting.loss_chunk_tokens, tokens)
    head = (
        (2 if setting.lora else 3)
        * tokens
        / chunk
        * product_s(chunk, shape.width, setting.vocab_size)
    )

    eager = 1.0 if step.is_compiled else assumed("EAGER_PASSES")
    blocks = eager * layers * tokens * value_bytes * _elements(shape)
    weight = setting.vocab_size * shape.width
    # The head's gradient of a chunk is added to an fp32 sum.
    loss = eager * _LOSS_PASSES * setting.vocab_size * tokens + 12.0 * weight * tokens / chunk
    sums = _SUM_ACCESSES * setting.accumulator_bytes * size.trained
    is_recomputed = setting.checkpointing != "none"
    again = once if setting.checkpointing == "block" else 0.0
    return (
        _Work(once + adapters + head, (blocks + loss) / memory_rate),
        _Work(
            back + 2 * adapters + again, ((3 if is_recomputed else 2) * blocks + sums) / memory_rate
        ),
    )


def _elements(shape: ModelSection) -> float:
    """Elements per token that a block's forward pass reads and writes beside matrix products.

    Fused as Inductor does: two residual sums with the norms that follow, rotary positions with the
    norms of queries and keys, and SwiGLU.
    """
    rotated = shape.query_width + shape.kv_width
    return 2 * 4 * shape.width + 2 * rotated + 3 * shape.hidden_mlp_width


def _update(step: TimedStep, device: Device, memory_rate: float) -> _Work:
    """Update of the rank that does most."""
    setting, size = step.setting, step.size
    ranks = setting.shard_ranks if setting.stage else 1
    updated = 0.0 if setting.offload != "none" else size.trained / ranks
    arithmetic = 0.0
    if setting.optimizer == "muon":
        flops = max(map(orthogonalization_flops, _owned(setting)), default=0.0)
        arithmetic = flops / (step.peak_flops * matmul_share(device))
    return _Work(arithmetic, _UPDATE_BYTES * updated / memory_rate)


def _owned(setting: Setting) -> list[tuple[MatrixShape, ...]]:
    """Matrices that each rank orthogonalizes."""
    if not setting.stage:
        return [matrices_of(setting.shape)]
    ranks, rank = setting.shard_ranks, setting.shard_rank
    if rank is not None:
        return [matrix_share(setting.shape, ranks, setting.stage, rank).owned]
    shares = matrix_shares(setting.shape, ranks, setting.stage)
    return list({share.owned: None for share in shares})


def _network(
    step: TimedStep, device: Device, forward_s: float, backward_s: float
) -> tuple[float, float]:
    """Seconds of communication that are exposed, and that passes hide."""
    setting, traffic = step.setting, step.traffic
    if setting.ranks == 1:
        return 0.0, 0.0
    durations = traffic.durations(device, step.nodes, setting.ranks_per_node)
    # Each block waits for its exchanges of activations.
    waits = traffic.sequence.calls * _latency_s(setting.sequence_parallel)
    sequence_s = durations.sequence_s + waits
    exposed, hidden = _weights_network(step, durations, forward_s, backward_s)
    return exposed + sequence_s, hidden


def _weights_network(
    step: TimedStep, durations: TrafficTime, forward_s: float, backward_s: float
) -> tuple[float, float]:
    """The same of weights, gradients and the optimizer."""
    setting, calls, count = step.setting, step.calls, step.micro_batches
    if setting.stage == 3:
        return _stage3_network(step, durations, forward_s, backward_s)
    latency = _latency_s(setting.shard_ranks)
    reductions = count if setting.stage == 2 and not setting.reduces_once else 1
    reduction = (durations.gradients_s + calls.gradients * latency) / reductions
    once = durations.weights_s + (calls.weights + calls.norms + calls.exchange) * latency
    once += calls.losses * _latency_s(setting.ranks)
    once += durations.replicas_s
    once += calls.replicas * _latency_s(setting.ranks // setting.shard_ranks)
    hidden = 0.0
    if setting.overlaps and setting.stage and not setting.reduces_once:
        hidden = min(reduction, assumed("OVERLAP_SHARE") * backward_s)
    exposed = reductions * (reduction - hidden) + once + durations.exchange_s
    return exposed, reductions * hidden


def _stage3_network(
    step: TimedStep, durations: TrafficTime, forward_s: float, backward_s: float
) -> tuple[float, float]:
    """The same at stage 3, which gathers weights layer by layer, and reduces as it goes back."""
    setting, traffic, calls = step.setting, step.traffic, step.calls
    count, latency = step.micro_batches, _latency_s(setting.ranks)
    waits = calls.weights * latency
    waits += calls.copied_weights * _latency_s(setting.ranks_per_node)
    gather = (durations.weights_s + waits) / (traffic.weight_passes * count)
    reductions = 1 if setting.reduces_once else count
    reduction = (durations.gradients_s + calls.gradients * latency) / reductions
    share = assumed("OVERLAP_SHARE") if setting.overlaps else 0.0
    ahead = min(gather, share * forward_s)
    during = gather * (traffic.weight_passes - 1)
    if not setting.reduces_once:
        during += reduction
    behind = min(during, share * backward_s)
    exposed = count * (gather - ahead + during - behind) + durations.exchange_s
    exposed += (calls.updated_weights + calls.norms + calls.exchange + calls.losses) * latency
    if setting.reduces_once:
        exposed += reduction
    return exposed, count * (ahead + behind)


def _latency_s(ranks: int) -> float:
    """Seconds that a collective takes besides its bytes."""
    return assumed("CALL_LATENCY_S") * log2(ranks)


def _launches_s(step: TimedStep) -> float:
    """Seconds of the host to launch a micro-batch's kernels, and of ZeRO 3's hooks."""
    setting = step.setting
    forward, backward, loss = _KERNELS[step.is_compiled]
    again = forward if setting.checkpointing == "block" else 0
    chunks = ceil(setting.micro_batch_tokens / setting.loss_chunk_tokens)
    kernels = setting.shape.num_layers * (forward + backward + again) + chunks * loss
    hooks = setting.shape.num_layers * assumed("STAGE3_HOST_S") if setting.stage == 3 else 0.0
    return kernels * assumed("LAUNCH_S") + hooks


def _offload_s(step: TimedStep) -> float:
    """Seconds of transfers to the host and of its update, which nothing hides."""
    setting = step.setting
    if setting.offload == "none":
        return 0.0
    share = step.size.trained / setting.ranks
    moved = share * (setting.accumulator_bytes * step.micro_batches + setting.weight_bytes)
    if setting.offload == "parameters":
        of_weights = step.size.total / setting.ranks
        moved += of_weights * setting.weight_bytes * step.traffic.weight_passes * step.micro_batches
    host = _HOST_UPDATE_BYTES * share * setting.ranks_per_node / assumed("HOST_MEMORY_BYTES")
    return moved / assumed("HOST_LINK_BYTES") + host
