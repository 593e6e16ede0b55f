"""Accumulation of gradients over a step's micro-batches, and their reduction over the ranks.

Choices and DeepSpeed's issues behind them are in docs/decisions/0055-gradients.md.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from megaback.config import ZeroSection

FP32_GRADIENTS = {"data_types": {"grad_accum_dtype": "fp32"}, "communication_data_type": "fp32"}
"""Fields of DeepSpeed's config for gradients that are accumulated and reduced in fp32."""


def reduction_fields(section: ZeroSection) -> dict[str, Any]:
    """Fields of DeepSpeed's `zero_optimization` for the reduction of gradients."""
    return {
        "overlap_comm": section.overlaps_communication,
        "use_multi_rank_bucket_allreduce": section.reduction == "all_reduce",
    }


@contextmanager
def zero_at_every_stage() -> Iterator[None]:
    """Make DeepSpeed shard by its ZeRO optimizer at stage 1 with fp32 gradients too.

    It would choose its BF16_Optimizer, of another layout. ZeRO's has what is needed: it is used
    with these settings when the optimizer is offloaded.
    """
    from deepspeed.runtime.engine import ZERO_OPTIMIZATION, DeepSpeedEngine

    usual = DeepSpeedEngine._do_optimizer_sanity_check

    def chosen(engine: Any, optimizer: Any) -> Any:
        return ZERO_OPTIMIZATION if engine.zero_optimization() else usual(engine, optimizer)

    DeepSpeedEngine._do_optimizer_sanity_check = chosen
    try:
        yield
    finally:
        DeepSpeedEngine._do_optimizer_sanity_check = usual


@contextmanager
def reducing_gradients(engine: Any) -> Iterator[None]:
    """Context of a step's backward passes; with `zero.reduce_once`, the reduction is at its end."""
    if not engine.reduces_once:
        yield
        return
    with engine.coalesce_grad_reduction():
        try:
            yield
        except BaseException:
            # A rank that fails exits, and does not wait for the others in a reduction.
            engine._flush_coalesced_reduction_zero12 = lambda _zero: None
            engine._flush_coalesced_reduction_zero3 = lambda _zero: None
            raise


def count_micro_batch(engine: Any) -> None:
    """Count a micro-batch that is not the step's last one."""
    if engine.reduces_once:
        engine.micro_steps += 1  # as engine.step does, which this context forbids
    else:
        engine.step()


def accumulate_in_fp32(engine: Any) -> None:
    """Accumulate in fp32 between the reductions of `zero.reduce_once`, at stages 2 and 3.

    DeepSpeed leaves this to PyTorch there, which would add in the type of the weights.
    """
    zero = engine.optimizer
    if engine.zero_optimization_stage() == 2:
        # ZeRO's way at stage 1, where gradients stay whole too.
        zero.use_grad_accum_attribute = True
        accumulate = zero._fill_param_grad_accum_attribute
    else:
        accumulate = _convert
    for weight in filter(lambda one: one.requires_grad, engine.module.parameters()):
        weight.register_post_accumulate_grad_hook(accumulate)


def _convert(weight: Tensor) -> None:
    """Convert a gradient to fp32, in which PyTorch then adds those of other micro-batches to it."""
    assert weight.grad is not None
    if weight.grad.dtype != torch.float32:
        weight.grad.data = weight.grad.data.float()
