"""Activation memory: bytes that a forward pass of `model.ReverseGPT` saves for its backward pass.

Counted tensor by tensor, as PyTorch saves them without torch.compile, which saves less. Tensors of
one value per head or token are included, so that the sum is exact (a test compares it with the
model's). Loads no torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypedDict

from megaback.config import ModelSection
from megaback.config_finetune import MATRIX_MODULES, LoraSection

Arithmetic = Literal["fp32", "bf16", "autocast"]
"""autocast: fp32 weights, matrix products in bf16 (bf16 at ZeRO stage 0)."""
Attention = Literal["flash_attn", "sdpa"]
_FP32 = 4


@dataclass(frozen=True)
class Activations:
    """Activation memory in bytes per token of a micro-batch."""

    block: float
    """Bytes per token that each block saves."""
    rest: float
    """Bytes per token that the embedding, rotary positions, final norm and loss save."""
    norm_work: float
    """Bytes per token in the final norm's backward pass, besides those of the blocks."""
    block_work: float
    """Bytes per token in a block's backward pass, besides those that blocks save."""


def activations_of(
    shape: ModelSection,
    arithmetic: Arithmetic,
    checkpointing: str,
    attention: Attention,
    sequence_parallel: int = 1,
    lora: LoraSection | None = None,
    *,
    saves_inputs: bool = False,
) -> Activations:
    """Activation memory per token of a rank. `checkpointing`, `sequence_parallel`: as in the
    config; `saves_inputs`: whether inputs of frozen matrices are saved too (at ZeRO stage 3)."""
    # The input of a matrix is saved for its gradient, or that of LoRA's first factor.
    with_inputs = MATRIX_MODULES if lora is None or saves_inputs else lora.target_modules
    whole, kept = (
        _block(shape, arithmetic, kind, attention, sequence_parallel, lora, with_inputs)
        for kind in ("none", checkpointing)
    )
    size = 4 if arithmetic == "fp32" else 2
    stream = _FP32 if arithmetic == "autocast" else size
    recomputed = checkpointing == "selective"
    throughout = 2 * _FP32 * shape.head_size + 8 + 8  # rotary positions, ids and targets
    # Most is allocated where the product of the MLP's gate has its gradient and those of both
    # factors, and the product is not needed any more.
    work = 2.0 * size * shape.hidden_mlp_width
    if checkpointing == "block":
        # The first norm's input is what the block saves, unless it is copied into fp32.
        work += whole if arithmetic == "bf16" else whole - kept
    elif recomputed:
        work += size * shape.hidden_mlp_width
    if lora is not None and not recomputed:
        if "down_proj" not in with_inputs:  # whose input, the product, is not among the saved
            work += size * shape.hidden_mlp_width
        elif checkpointing == "block" and arithmetic == "autocast":
            # The product in fp32, for peft, and its copy for the first factor.
            work += 3.0 * size * shape.hidden_mlp_width
    # The final norm's input, its gradient, and what the other part of it is computed from.
    norm_work = 6.0 * _FP32 * shape.width
    if recomputed and arithmetic == "bf16":
        norm_work += size * shape.width
    head_gradient = size * shape.width
    return Activations(
        block=kept,
        rest=_norm(shape.width, arithmetic, recomputed=recomputed, is_frozen=lora is not None)
        + head_gradient
        + throughout,
        norm_work=norm_work + throughout,
        block_work=work + stream * shape.width + throughout,
    )


@dataclass(frozen=True)
class LossMemory:
    """Memory of `model.output_head` at its peak, in bytes."""

    weight_gradient: float
    """Sum of the chunks' gradients of the head's weight, until the backward pass has used it."""
    chunk: float
    """Logits of a chunk, and what is computed from them."""
    hidden: float
    """Hidden states, in bytes per token, which the forward pass holds besides their gradients."""


def loss_memory(
    shape: ModelSection, vocab_size: int, arithmetic: Arithmetic, tokens: int, chunk_tokens: int
) -> LossMemory:
    """Memory of the loss of a micro-batch of `tokens`."""
    weight, logits = vocab_size * shape.width, vocab_size * min(tokens, chunk_tokens)
    # Logits and their logarithms, or gradients in both types with the product to be added.
    chunk, product = 2.0 * _FP32 * logits, 0.0
    if arithmetic != "fp32":
        product = 2.0 * weight
        chunk = max(chunk, (_FP32 + 2.0) * logits + product)
    copies = 0.0
    if arithmetic == "autocast":  # of weight and hidden states
        copies = 2.0 * weight
    stream = {"fp32": _FP32, "bf16": 2, "autocast": _FP32 + 2}[arithmetic]
    return LossMemory(
        weight_gradient=float(_FP32 * weight),
        chunk=chunk + copies,
        hidden=float(stream * shape.width),
    )


def _norm(
    width: int, arithmetic: Arithmetic, *, recomputed: bool, is_frozen: bool = False
) -> float:
    """Bytes of an RMSNorm over `width` dimensions: input in fp32, divisor and quotient.

    If recomputed, the input in its own precision. (In fp32 both are the same tensor.) The quotient
    is for the gradient of the weight.
    """
    kept = 2 if arithmetic == "bf16" else _FP32
    quotient = 0 if is_frozen else kept
    if recomputed:
        return (kept + quotient) * width
    return (_FP32 + quotient) * width + _FP32


def _head_norm(
    width: int, heads: int, arithmetic: Arithmetic, *, recomputed: bool, is_frozen: bool
) -> float:
    """Bytes of the norms of query or key heads, whose input is bf16 in autocast."""
    size = 4 if arithmetic == "fp32" else 2
    quotient = 0 if is_frozen else size
    if recomputed:
        return (size + quotient) * width
    return (_FP32 + quotient) * width + _FP32 * heads


def _block(
    shape: ModelSection,
    arithmetic: Arithmetic,
    checkpointing: str,
    attention: Attention,
    sequence_parallel: int,
    lora: LoraSection | None,
    with_inputs: Sequence[str],
) -> float:
    """Bytes per token that a block saves. `with_inputs`: matrices whose inputs are saved."""
    size = 4 if arithmetic == "fp32" else 2
    width, mlp_width = shape.width, shape.hidden_mlp_width
    query_width, kv_width = shape.query_width, shape.kv_width
    if checkpointing == "block":
        return (_FP32 if arithmetic == "autocast" else size) * width
    recomputed = checkpointing == "selective"
    copies = [len({*with_inputs} & {*names}) for names in (MATRIX_MODULES[:3], MATRIX_MODULES[4:6])]
    if arithmetic != "autocast":  # which copies it once per matrix
        copies = [min(count, 1) for count in copies]
    of_norms: _OfNorms = {"recomputed": recomputed, "is_frozen": lora is not None}
    norms = 2 * _norm(width, arithmetic, **of_norms)
    inputs = sum(copies) * size * width
    heads = 0.0
    if shape.qk_norm:
        heads += _head_norm(query_width, shape.num_heads, arithmetic, **of_norms)
        heads += _head_norm(kv_width, shape.kv_heads, arithmetic, **of_norms)
    if recomputed:  # inputs of the rotary embedding; fp32 after a norm in autocast
        turned = _FP32 if arithmetic == "autocast" and shape.qk_norm else size
        heads += turned * (query_width + kv_width)
    # sdpa repeats keys and values for the query heads that share them, and its result is copied
    # into token order.
    if attention == "sdpa":
        attended = size * (5 if "o_proj" in with_inputs else 4) * query_width
    else:
        # Ranks that share a key head have copies, and get the result as another tensor.
        repeats = max(sequence_parallel // shape.kv_heads, 1)
        results = 2 if sequence_parallel > 1 else 1
        attended = size * ((1 + results) * query_width + 2 * repeats * kv_width)
    attended += _FP32 * shape.num_heads
    mlp = size * mlp_width * ((2 if recomputed else 3) + ("down_proj" in with_inputs))
    between = 0 if lora is None else size * (lora.rank or 0) * len(lora.target_modules)
    return norms + inputs + heads + attended + mlp + between


class _OfNorms(TypedDict):
    recomputed: bool
    is_frozen: bool
