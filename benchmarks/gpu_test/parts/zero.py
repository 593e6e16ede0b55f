"""ZeRO 0 to 3, AdamW and Muon, against a plain PyTorch loop of the same model."""

from typing import Any

import torch

from benchmarks.gpu_test.bench import Bench
from benchmarks.gpu_test.claims import NCCL, OFFLOAD
from benchmarks.gpu_test.training import Stepper, alone, config_of, synthetic_batches
from data_pipeline.loading.rows import IGNORED_TARGET, Batch
from megaback.config import Config
from megaback.distributed.world import World
from megaback.model.attention_choice import choose_attention
from megaback.model.gpt import ReverseGPT
from megaback.optim.build import build_optimizer
from megaback.training.validation import to_device

VOCAB_SIZE = 600
MAX_FP32_NATS = 2e-4
MAX_BF16_NATS = 0.01
"""ZeRO's weights in bf16, with fp32 copies, against autocast of fp32 weights."""


def run(bench: Bench) -> None:
    world = alone(bench)
    precisions = bench.sized(("fp32", "bf16"), ("fp32", "bf16"), ("fp32",))
    for optimizer in bench.sized(("adamw", "muon"), ("adamw", "muon"), ("muon",)):
        for precision in precisions:
            plain = None
            for stage in bench.sized((0, 1, 2, 3), (0, 1, 2, 3), (1,)):
                config = _config(bench, optimizer, precision, stage)
                plain = plain or _plain_losses(bench, config)
                _compare(bench, world, config, plain, NCCL)
            if precision == "bf16" and optimizer == "adamw" and plain is not None:
                config = _config(bench, optimizer, precision, 2, offload="optimizer")
                _compare(bench, world, config, plain, OFFLOAD)


def _config(
    bench: Bench, optimizer: str, precision: str, stage: int, offload: str = "none"
) -> Config:
    return config_of(
        {
            "model": bench.sized(
                {"num_layers": 4, "width": 512, "num_heads": 8, "num_kv_heads": 2},
                {"num_layers": 2, "width": 64, "num_heads": 4, "num_kv_heads": 2},
                {"num_layers": 1, "width": 32, "num_heads": 2},
            ),
            "batch": {
                "context_tokens": bench.sized(512, 64, 32),
                "global_batch_rows": 8,
                "micro_batch_rows": 4,
            },
            "optimizer": {"name": optimizer, "learning_rate": 1e-3, "gradient_clip": 1.0},
            "training": {"steps": bench.sized(10, 6, 2), "precision": precision, "seed": 3},
            "zero": {"stage": stage, "offload": offload},
        },
        bench,
    )


def _batches(config: Config) -> list[list[Batch]]:
    steps, context_tokens = config.training.steps or 0, config.batch.context_tokens
    flat = synthetic_batches(4, context_tokens, VOCAB_SIZE, 2 * steps)
    # Random targets cannot be learned: the next id is a function of the id.
    for batch in flat:
        is_target_T = batch.targets_T != IGNORED_TARGET
        batch.targets_T[is_target_T] = (batch.ids_T[is_target_T] * 7 + 1) % VOCAB_SIZE
    return [flat[2 * step : 2 * step + 2] for step in range(steps)]


def _compare(bench: Bench, world: World, config: Config, plain: list[float], claim: str) -> None:
    section = config.zero
    offload = ", optimizer on the host" if section.offload != "none" else ""
    precision = config.training.precision
    name = f"ZeRO {section.stage}, {config.optimizer.name}, {precision}{offload}"
    with bench.attempt(name, claim):
        stepper = Stepper.start(config, world, VOCAB_SIZE, compiled=False)
        losses = [float(stepper.step(batches)) for batches in _batches(config)]
        stepper.close()
        bound = MAX_FP32_NATS if precision == "fp32" else MAX_BF16_NATS
        difference = max(abs(one - other) for one, other in zip(losses, plain, strict=True))
        bench.require(
            name,
            difference <= bound and losses[-1] < losses[0],
            f"losses of a plain loop, at most {bound} nats off, and falling",
            claim,
            attention=stepper.attention.name,
            max_difference_nats=difference,
            first_loss=losses[0],
            last_loss=losses[-1],
        )


def _plain_losses(bench: Bench, config: Config) -> list[float]:
    """Losses of a loop with autocast, the backend of the run, and PyTorch's AdamW or our Muon."""
    device, section = bench.device, config.optimizer
    is_bf16 = config.training.precision == "bf16"
    dtype = torch.bfloat16 if is_bf16 else torch.float32
    attention = choose_attention(config.hardware.attention, device, dtype, config.model.head_size)
    model = ReverseGPT(config.model, VOCAB_SIZE, attention.backend)
    model.initialize(config.training.seed)
    model.to(device).train()
    optimizer = _optimizer(model, config)
    losses = []
    for micro_batches in _batches(config):
        num_targets = sum(batch.num_targets for batch in micro_batches)
        total = 0.0
        for batch in micro_batches:
            with torch.autocast(device.type, torch.bfloat16, enabled=is_bf16):
                loss = model(*to_device(batch, device)).sum() / num_targets
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(model.parameters(), section.gradient_clip)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses


def _optimizer(model: ReverseGPT, config: Config) -> Any:
    section = config.optimizer
    if section.name == "muon":
        optimizer = build_optimizer(model.named_parameters(), config.model, section)
        for group in optimizer.param_groups:
            group["lr"] = group["peak_learning_rate"]
        return optimizer
    weights = list(model.parameters())
    groups: list[dict[str, Any]] = [
        {"params": [weight for weight in weights if weight.ndim > 1]},
        {"params": [weight for weight in weights if weight.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=section.learning_rate,
        betas=(section.beta1, section.beta2),
        eps=section.epsilon,
        weight_decay=section.weight_decay,
    )
