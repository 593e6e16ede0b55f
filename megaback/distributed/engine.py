"""DeepSpeed engine and its config, built from ours; no other module writes a DeepSpeed config.

Workarounds for DeepSpeed 0.19 are listed in docs/decisions/0003-deepspeed-workarounds.md.
"""

import importlib
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

from megaback.config import Config
from megaback.distributed.gradients import (
    FP32_GRADIENTS,
    accumulate_in_fp32,
    reduction_fields,
    zero_at_every_stage,
)
from megaback.distributed.shard_groups import (
    average_over_replicas,
    node_group,
    sharding_within,
    whole_group,
)
from megaback.model.compiler import GraphCounter
from megaback.model.gpt import ReverseGPT
from megaback.optim.build import attach_shards, build_optimizer
from megaback.planning.memory import bucket_elements


def start_engine(
    model: ReverseGPT,
    config: Config,
    micro_batch_rows: int,
    accumulation_steps: int,
    compiler: GraphCounter | None = None,
) -> Any:
    """Wrap the model in a DeepSpeed engine, compiled by the compiler, if there is one."""
    import deepspeed

    _import_deepspeed_muon()
    matrix_dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    stage = config.zero.stage
    named = [(name, one) for name, one in model.named_parameters() if one.requires_grad]
    optimizer = build_optimizer(named, config.model, config.optimizer, matrix_dtype)
    num_trained = sum(one.numel() for _, one in named)
    sizes = model.num_parameters(), num_trained
    fields = deepspeed_config(config, micro_batch_rows, accumulation_steps, *sizes)
    nodes = whole_group()
    if config.zero.hierarchical:
        nodes = node_group(config.hardware.collective_timeout_s)
    if stage == 3 and nodes.num_replicas > 1:
        fields["zero_optimization"]["zero_hpz_partition_size"] = nodes.size
    with zero_at_every_stage(), sharding_within(nodes, stage):
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=fields, dist_init_required=False
        )
    engine.reduces_once = config.reduces_once(accumulation_steps)
    if engine.reduces_once and config.has_fp32_accumulators:
        accumulate_in_fp32(engine)
    # At stage 3 only copies of the weights are of a node.
    shards = engine.shards = whole_group() if stage == 3 else nodes
    if shards.num_replicas > 1:
        average_over_replicas(engine.optimizer, shards)
    zero, device = engine.optimizer, engine.device
    attach_shards(optimizer, zero, stage, device, shards.rank, shards.size, shards.group)
    if compiler is not None:
        engine.compile(backend=compiler)
    return engine


def _import_deepspeed_muon() -> None:
    """Import DeepSpeed's own Muon without compiling it.

    DeepSpeed imports it at every start, for any optimizer, and loads PyTorch's compiler for it,
    which takes a second. It is never called: our Muon is in `megaback.optim`.
    """
    from deepspeed.runtime import compiler

    usual = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = usual


def deepspeed_config(
    config: Config,
    micro_batch_rows: int,
    accumulation_steps: int,
    num_parameters: int,
    num_trained: int | None = None,
) -> dict[str, Any]:
    """The DeepSpeed config that corresponds to ours. `num_trained`: None if all parameters are."""
    stage = config.zero.stage
    bucket = bucket_elements(num_trained or num_parameters)
    fields: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket,
            "allgather_bucket_size": bucket,
        },
    }
    if config.zero.offload != "none":
        # By default DeepSpeed compiles its own optimizer for the host, which takes minutes.
        fields["zero_force_ds_cpu_optimizer"] = False
        fields["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if config.zero.offload == "parameters":
        fields["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if stage == 3:
        del fields["zero_optimization"]["allgather_bucket_size"]
        prefetched = bucket_elements(num_parameters)  # frozen weights too
        fields["zero_optimization"]["stage3_prefetch_bucket_size"] = prefetched
    if config.training.precision == "bf16":
        if stage == 0:
            # At stage 0, DeepSpeed's bf16 optimizer takes a step on zero gradients at startup.
            fields["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        else:
            # The step guard sees a norm that is not finite.
            fields["bf16"] = {"enabled": True, "check_grad_overflow": False}
    fields["zero_optimization"] |= reduction_fields(config.zero)
    if config.has_fp32_accumulators:
        fields |= FP32_GRADIENTS
    return fields


def set_learning_rates(engine: Any, factor: float) -> None:
    """Set every learning rate to `factor` times its peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * group["peak_learning_rate"]


def take_step(
    engine: Any, reason_to_skip: Callable[[float], str | None]
) -> tuple[float, str | None]:
    """Clip and update, unless `reason_to_skip` returns a reason for the gradient norm.

    Returns the norm of the whole gradient before clipping, and the reason. Gradients are cleared in
    either case.
    """
    zero = engine.optimizer

    @cache
    def norm() -> float:
        if engine.zero_optimization_stage():
            return float(zero._global_grad_norm)
        # Gradients are whole and already averaged, and the engine does not keep their norm.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        return float(torch.nn.utils.get_total_norm(gradients))

    @cache
    def reason() -> str | None:
        return reason_to_skip(norm())

    # DeepSpeed calls the optimizer for every parameter group once it knows the norm, except when it
    # skips the step itself, for a non-finite norm.
    engine.basic_optimizer.must_skip = lambda: reason() is not None
    if not engine.zero_optimization_stage():
        norm()  # before it is clipped
    engine.step()
    return norm(), reason()
