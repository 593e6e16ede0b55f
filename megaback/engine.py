"""DeepSpeed's engine from our config: the one module that writes a DeepSpeed config.

What DeepSpeed gets wrong by itself is set right here: see docs/decisions/0003-deepspeed.md.
"""

import math
from typing import Any

import torch
from torch import nn

from megaback.config import Config, OptimizerSection

_LEAST_BUCKET_ELEMENTS = 1_000_000
_MOST_BUCKET_ELEMENTS = 500_000_000


def start_engine(
    model: nn.Module, config: Config, micro_batch_rows: int, accumulation_steps: int
) -> Any:
    """Hand the model to DeepSpeed: sharding, precision, accumulation and clipping."""
    import deepspeed

    optimizer = build_optimizer(model, config.optimizer)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=deepspeed_config(config, micro_batch_rows, accumulation_steps, num_parameters),
        dist_init_required=False,
    )
    return engine


def build_optimizer(model: nn.Module, section: OptimizerSection) -> torch.optim.Optimizer:
    """Fused AdamW (Loshchilov & Hutter, 2019) with weight decay on matrices only."""
    matrices = [parameter for parameter in model.parameters() if parameter.ndim >= 2]
    vectors = [parameter for parameter in model.parameters() if parameter.ndim < 2]
    return torch.optim.AdamW(
        [
            {"params": matrices, "weight_decay": section.weight_decay},
            {"params": vectors, "weight_decay": 0.0},
        ],
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        fused=True,
    )


def deepspeed_config(
    config: Config, micro_batch_rows: int, accumulation_steps: int, num_parameters: int
) -> dict[str, Any]:
    """Our config in DeepSpeed's words."""
    stage = config.zero.stage
    # DeepSpeed's default buckets are made for models of billions of weights; on small ones they
    # cost memory and time.
    bucket_elements = min(max(num_parameters // 8, _LEAST_BUCKET_ELEMENTS), _MOST_BUCKET_ELEMENTS)
    fields: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_rows,
        "gradient_accumulation_steps": accumulation_steps,
        "gradient_clipping": config.optimizer.gradient_clip,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": None,
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": bucket_elements,
            "allgather_bucket_size": bucket_elements,
        },
    }
    if stage == 3:
        del fields["zero_optimization"]["allgather_bucket_size"]
        fields["zero_optimization"]["stage3_prefetch_bucket_size"] = bucket_elements
    if config.training.precision == "bf16":
        if stage == 0:
            # DeepSpeed's bf16 optimizer of stage 0 takes a step on zero gradients at start-up.
            fields["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        else:
            fields["bf16"] = {"enabled": True}
    return fields


def learning_rate_at(step: int, total_steps: int, section: OptimizerSection) -> float:
    """The learning rate of a step, counted from 0: linear warmup, then a cosine.

    A pure function of the step, so that a restart needs no state. The cosine ends at
    `final_learning_rate_ratio` of the peak on the last step (Loshchilov & Hutter, "SGDR", 2017).
    """
    peak = section.learning_rate
    if step < section.warmup_steps:
        return peak * (step + 1) / section.warmup_steps
    progress = (step - section.warmup_steps) / max(total_steps - 1 - section.warmup_steps, 1)
    cosine = 0.5 * (1 + math.cos(math.pi * min(progress, 1.0)))
    floor = section.final_learning_rate_ratio
    return peak * (floor + (1 - floor) * cosine)


def set_learning_rate(engine: Any, learning_rate: float) -> None:
    for group in engine.optimizer.param_groups:
        group["lr"] = learning_rate


def take_step(engine: Any) -> float:
    """Clip and update. Returns the norm of the whole gradient before clipping."""
    norm = None
    if engine.zero_optimization_stage() == 0:
        # Here gradients are whole and already averaged, and the engine keeps no norm of them.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
    engine.step()
    if norm is None:
        norm = engine.get_global_grad_norm()
    return float(norm)
