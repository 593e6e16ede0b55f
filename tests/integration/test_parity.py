"""DeepSpeed in every way that the config offers, against the same training as a plain loop."""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

from megaback.model.gpt import ReverseGPT
from tests.helpers.tiny_run import PlainResult, curve_of, read_run_config, train_plainly

pytestmark = pytest.mark.slow

STEPS = 25
SHORT = (
    f"training.steps={STEPS}",
    "training.loss_chunk_tokens=48",  # the plain loop has whole logits
    "validation.every_steps=null",
    "checkpoint.every_steps=null",
)
MUON = ("optimizer.name=muon", "optimizer.matrix_learning_rate=0.01")
WIDE_STEPS = 5
WIDE = (
    "model.width=256",
    "model.num_layers=1",
    f"training.steps={WIDE_STEPS}",
    "optimizer.warmup_steps=1",
)
BF16 = ("training.precision=bf16",)

RunOf = Callable[..., Path]
PlainOf = Callable[..., PlainResult]


@pytest.fixture(scope="module")
def plain_of(tiny_shards: Path) -> PlainOf:
    """`plain_of(*overrides)`: the plain loop, trained once."""

    @cache
    def trained(*overrides: str) -> PlainResult:
        return train_plainly(read_run_config(tiny_shards, *SHORT, *overrides))

    return trained


def largest_difference(run: Path, plain: PlainResult) -> float:
    losses = curve_of(run)
    assert len(losses) == len(plain.losses) > 0
    return max(abs(one - other) for one, other in zip(losses, plain.losses, strict=True))


@pytest.mark.parametrize(
    "ways",
    [
        ("zero.stage=0",),
        ("zero.stage=1",),
        ("zero.stage=2",),
        ("zero.stage=3",),
        ("zero.stage=2", "batch.micro_batch_rows=4"),  # no accumulation
        ("zero.stage=2", "training.activation_checkpointing=selective"),
        ("zero.stage=3", "training.activation_checkpointing=block"),
        ("zero.stage=2", "zero.reduction=reduce", "zero.overlap_communication=true"),
        ("zero.stage=3", "zero.reduce_once=true"),
        ("zero.stage=1", "zero.offload=optimizer"),
        ("zero.stage=2", "zero.offload=optimizer"),
        ("zero.stage=3", "zero.offload=optimizer"),
        ("zero.stage=3", "zero.offload=parameters"),
        ("zero.stage=3", "zero.offload=parameters", "training.activation_checkpointing=selective"),
        # Compiling on a busy machine can take the GIL for longer than five heartbeats of 5 s.
        ("zero.stage=1", "training.compile=true", "hardware.heartbeat_s=30"),
    ],
    ids=" ".join,
)
def test_every_way_of_training_gives_the_losses_of_a_plain_loop(
    ways: tuple[str, ...], run_of: RunOf, plain_of: PlainOf
) -> None:
    assert largest_difference(run_of(*SHORT, *ways), plain_of()) < 1e-4


@pytest.mark.parametrize(
    "ways",
    [(*MUON, "training.activation_checkpointing=block"), ("zero.offload=parameters",)],
    ids=" ".join,
)
def test_weights_that_stage_3_gathers_give_the_losses_of_a_plain_loop(
    ways: tuple[str, ...], run_of: RunOf, plain_of: PlainOf, tiny_shards: Path
) -> None:
    """DeepSpeed keeps smaller weights whole on every rank, as all of the other tests' are."""
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    run = run_of(*SHORT, *WIDE, *ways, "zero.stage=3")

    plain = plain_of(*WIDE, *(way for way in ways if way in MUON))
    assert largest_difference(run, plain) < 1e-4
    model = ReverseGPT(read_run_config(tiny_shards, *WIDE).model, 600)
    threshold = DeepSpeedZeroConfig().param_persistence_threshold
    assert sum(weight.numel() > threshold for weight in model.parameters()) >= 3


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_muon_gives_the_losses_of_whole_matrices_at_every_stage(
    stage: int, run_of: RunOf, plain_of: PlainOf
) -> None:
    run = run_of(*SHORT, *MUON, f"zero.stage={stage}")

    assert largest_difference(run, plain_of(*MUON)) < 1e-4


def test_offloaded_muon_gives_the_losses_of_whole_matrices(
    run_of: RunOf, plain_of: PlainOf
) -> None:
    run = run_of(*SHORT, *MUON, "zero.stage=2", "zero.offload=optimizer")

    assert largest_difference(run, plain_of(*MUON)) < 1e-4


def test_muon_learns_faster_than_adamw_though_gradients_are_clipped(plain_of: PlainOf) -> None:
    muon, adamw = plain_of(*MUON), plain_of()

    assert sum(norm > 0.5 for norm in muon.gradient_norms) > STEPS / 2
    assert sum(muon.losses[-10:]) < sum(adamw.losses[-10:])


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_bf16_gives_the_losses_of_a_plain_loop_in_bf16(
    stage: int, run_of: RunOf, plain_of: PlainOf
) -> None:
    run = run_of(*SHORT, *BF16, f"zero.stage={stage}")

    assert largest_difference(run, plain_of(*BF16)) < 1e-2


def test_fp32_gradients_give_the_losses_of_a_plain_loop_in_bf16(
    run_of: RunOf, plain_of: PlainOf
) -> None:
    ways = ("zero.stage=2", "zero.gradient_precision=fp32", "zero.reduce_once=true")

    assert largest_difference(run_of(*SHORT, *BF16, *ways), plain_of(*BF16)) < 1e-2


def test_the_losses_of_a_run_with_z_loss_are_reported_without_it(
    run_of: RunOf, plain_of: PlainOf
) -> None:
    z_loss = "optimizer.z_loss=0.01"

    assert largest_difference(run_of(*SHORT, "zero.stage=1", z_loss), plain_of(z_loss)) < 1e-4
    assert plain_of(z_loss).losses != plain_of().losses
    assert plain_of(z_loss).losses[0] == plain_of().losses[0]
