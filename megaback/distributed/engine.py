"""DeepSpeed's engine from our config: the one module that writes a DeepSpeed config.

Workarounds for DeepSpeed 0.19 are listed in docs/decisions/0003-deepspeed-workarounds.md.
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch

from megaback.config import Config
from megaback.model.gpt import ReverseGPT
from megaback.optim.build import attach_shards, build_optimizer
from megaback.planning.memory import bucket_elements


def start_engine(
    model: ReverseGPT, config: Config, micro_batch_rows: int, accumulation_steps: int
) -> Any:
    """Hand the model to DeepSpeed: sharding, precision, accumulation, clipping, compilation."""
    import deepspeed

    _import_deepspeed_muon()
    matrix_dtype = torch.bfloat16 if config.training.precision == "bf16" else torch.float32
    named = model.named_parameters()
    optimizer = build_optimizer(named, config.model, config.optimizer, matrix_dtype)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(
            config, micro_batch_rows, accumulation_steps, model.num_parameters()
        ),
        dist_init_required=False,
    )
    attach_shards(optimizer, engine.optimizer, config.zero.stage, engine.device)
    if config.training.compile:
        model.exclude_attention_from_compile()
        engine.compile()
    return engine


def _import_deepspeed_muon() -> None:
    """Import DeepSpeed's own Muon without compiling it.

    DeepSpeed does it at every start, whatever the optimizer is, and loads all of PyTorch's compiler
    for it, which takes a second. It is never called: our Muon is another (`optimizers.py`).
    """
    from deepspeed.runtime import compiler

    usual = compiler.compile
    compiler.compile = lambda: lambda function: function
    try:
        importlib.import_module("deepspeed.runtime.zero.muon.muon_optimizer")
    finally:
        compiler.compile = usual


def deepspeed_config(
    config: Config, micro_batch_rows: int, accumulation_steps: int, num_parameters: int
) -> dict[str, Any]:
    """Our config in DeepSpeed's words."""
    stage = config.zero.stage
    bucket = bucket_elements(num_parameters)
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
        # Left alone, DeepSpeed compiles an optimizer of its own for the host, for minutes.
        fields["zero_force_ds_cpu_optimizer"] = False
        fields["zero_optimization"]["offload_optimizer"] = {"device": "cpu"}
    if config.zero.offload == "parameters":
        fields["zero_optimization"]["offload_param"] = {"device": "cpu"}
    if stage == 3:
        del fields["zero_optimization"]["allgather_bucket_size"]
        fields["zero_optimization"]["stage3_prefetch_bucket_size"] = bucket
    if config.training.precision == "bf16":
        if stage == 0:
            # DeepSpeed's bf16 optimizer of stage 0 takes a step on zero gradients at start-up.
            fields["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        else:
            fields["bf16"] = {"enabled": True}
    return fields


def set_learning_rates(engine: Any, factor: float) -> None:
    """Set every learning rate to a part of its peak."""
    for group in engine.optimizer.param_groups:
        group["lr"] = factor * group["peak_learning_rate"]


def take_step(
    engine: Any, reason_to_skip: Callable[[float], str | None]
) -> tuple[float, str | None]:
    """Clip and update, unless there is a reason not to, given the gradient's norm.

    Returns the norm of the whole gradient before clipping, and the reason. Whatever it is, the
    gradients are gone afterwards.
    """
    zero, stage = engine.optimizer, engine.zero_optimization_stage()
    whole = None
    if stage == 0:
        # Here gradients are whole and already averaged, and the engine keeps no norm of them.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        whole = float(torch.nn.utils.get_total_norm(gradients))

    def norm() -> float:
        return whole if whole is not None else float(zero._global_grad_norm)

    # DeepSpeed asks the optimizer once it knows the norm. Where it skips a step by itself, for a
    # norm that is no number, it does not ask.
    engine.basic_optimizer.must_skip = lambda: reason_to_skip(norm()) is not None
    engine.step()
    return norm(), reason_to_skip(norm())
