"""The learning rate is a pure function of the step, and DeepSpeed is told what we mean."""

import math
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from megaback.config import Config, OptimizerSection
from megaback.distributed.engine import deepspeed_config
from megaback.model.gpt import ReverseGPT
from megaback.optim.build import build_optimizer
from megaback.optim.lr_schedule import rate_factor_at

PEAK = 3e-4

runs = st.tuples(
    st.integers(1, 2000),  # steps of the run
    st.integers(0, 300),  # steps of warmup
    st.floats(0, 1),  # ratio at the end
)


def section(warmup_steps: int = 0, ratio: float = 0.1, **changes: Any) -> OptimizerSection:
    return OptimizerSection(
        learning_rate=PEAK, warmup_steps=warmup_steps, final_learning_rate_ratio=ratio, **changes
    )


@given(run=runs, share=st.floats(0, 1))
def test_warmup_is_a_straight_line_from_nothing_to_the_peak(
    run: tuple[int, int, float], share: float
) -> None:
    total_steps, warmup_steps, ratio = run
    assume(warmup_steps > 0)
    step = min(int(share * warmup_steps), warmup_steps - 1)

    rate = rate_factor_at(step, total_steps, section(warmup_steps, ratio))

    assert rate == pytest.approx((step + 1) / warmup_steps)


@given(run=runs)
def test_the_peak_is_reached_when_warmup_ends(run: tuple[int, int, float]) -> None:
    total_steps, warmup_steps, ratio = run

    assert rate_factor_at(warmup_steps, total_steps, section(warmup_steps, ratio)) == pytest.approx(
        1
    )


@given(run=runs)
def test_after_the_peak_the_rate_never_rises(run: tuple[int, int, float]) -> None:
    total_steps, warmup_steps, ratio = run
    rates = [
        rate_factor_at(step, total_steps, section(warmup_steps, ratio))
        for step in range(warmup_steps, total_steps)
    ]

    assert all(later <= earlier for earlier, later in pairwise(rates))


@given(run=runs)
def test_the_last_step_has_the_final_ratio_of_the_peak(run: tuple[int, int, float]) -> None:
    total_steps, warmup_steps, ratio = run
    assume(total_steps >= warmup_steps + 2)

    rate = rate_factor_at(total_steps - 1, total_steps, section(warmup_steps, ratio))

    assert rate == pytest.approx(ratio, abs=1e-12)


@given(run=runs, beyond=st.integers(0, 100))
def test_past_the_end_the_rate_stays_at_the_final_ratio(
    run: tuple[int, int, float], beyond: int
) -> None:
    total_steps, warmup_steps, ratio = run
    assume(total_steps >= warmup_steps + 2)

    rate = rate_factor_at(total_steps + beyond, total_steps, section(warmup_steps, ratio))

    assert rate == pytest.approx(ratio, abs=1e-12)


@given(run=runs, step=st.integers(0, 3000))
def test_every_rate_is_positive_or_the_zero_that_was_asked_for(
    run: tuple[int, int, float], step: int
) -> None:
    total_steps, warmup_steps, ratio = run

    assert 0 <= rate_factor_at(step, total_steps, section(warmup_steps, ratio)) <= 1


def test_halfway_down_the_cosine_the_rate_is_halfway_between_peak_and_end() -> None:
    assert rate_factor_at(15, 21, section(10)) == pytest.approx((1 + 0.1) / 2)


@given(run=runs, decay=st.floats(0.01, 1), schedule=st.sampled_from(["wsd", "linear"]))
def test_every_schedule_begins_at_the_peak_never_rises_and_ends_at_the_final_ratio(
    run: tuple[int, int, float], decay: float, schedule: str
) -> None:
    total_steps, warmup_steps, ratio = run
    assume(total_steps >= warmup_steps + 2)
    numbers = section(warmup_steps, ratio, schedule=schedule, decay_fraction=decay)
    rates = [
        rate_factor_at(step, total_steps, numbers) for step in range(warmup_steps, total_steps)
    ]

    assert rates[0] == pytest.approx(1)
    assert rates[-1] == pytest.approx(ratio, abs=1e-12)
    assert all(later <= earlier for earlier, later in pairwise(rates))


def test_wsd_stays_at_the_peak_until_its_last_part() -> None:
    numbers = section(10, 0.0, schedule="wsd", decay_fraction=0.2)
    rates = [rate_factor_at(step, 101, numbers) for step in range(101)]

    assert rates[10:81] == [1] * 71
    assert rates[90] == pytest.approx(0.5)


def test_linear_is_a_straight_line_from_the_peak() -> None:
    numbers = section(0, 0.2, schedule="linear")

    assert rate_factor_at(25, 101, numbers) == pytest.approx(1 - 0.8 / 4)


def test_the_rate_of_a_step_does_not_depend_on_what_was_asked_before() -> None:
    steps = [7, 3, 90, 7, 3]

    rates = [rate_factor_at(step, 100, section(10)) for step in steps]

    assert rates[:2] == rates[3:]


def config(**changes: dict[str, Any]) -> Config:
    fields: dict[str, Any] = {
        "run": "run",
        "data": {"shards": "shards"},
        "model": {"num_layers": 2, "width": 32, "num_heads": 4},
        "batch": {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 2},
        "optimizer": {"learning_rate": 1e-3, "gradient_clip": 0.7},
        "training": {"steps": 10, "precision": "fp32"},
    }
    return Config.model_validate(fields | changes)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_is_kept_on_the_host_and_is_ours(stage: int) -> None:
    fields = deepspeed_config(config(zero={"stage": stage, "offload": "optimizer"}), 2, 4, 10_000)

    assert fields["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert fields["zero_force_ds_cpu_optimizer"] is False


def test_offloaded_parameters_take_the_optimizer_with_them() -> None:
    fields = deepspeed_config(config(zero={"stage": 3, "offload": "parameters"}), 2, 4, 10_000)

    assert fields["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert fields["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_deepspeed_gets_micro_batch_accumulation_and_clipping() -> None:
    fields = deepspeed_config(config(), 2, 4, 10_000)

    assert fields["train_micro_batch_size_per_gpu"] == 2
    assert fields["gradient_accumulation_steps"] == 4
    assert fields["gradient_clipping"] == 0.7


def test_no_clipping_is_no_clipping_for_deepspeed() -> None:
    optimizer = {"learning_rate": 1e-3, "gradient_clip": 0}

    assert deepspeed_config(config(optimizer=optimizer), 2, 4, 10_000)["gradient_clipping"] == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_gets_the_zero_stage(stage: int) -> None:
    fields = deepspeed_config(config(zero={"stage": stage}), 2, 4, 10_000)

    assert fields["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_asks_deepspeed_for_no_other_precision(stage: int) -> None:
    fields = deepspeed_config(config(zero={"stage": stage}), 2, 4, 10_000)

    assert not fields.keys() & {"bf16", "fp16", "torch_autocast"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_deepspeeds_own_where_the_optimizer_is_sharded(stage: int) -> None:
    settings = config(zero={"stage": stage}, training={"steps": 10, "precision": "bf16"})

    assert deepspeed_config(settings, 2, 4, 10_000)["bf16"] == {"enabled": True}


def test_bf16_without_sharding_is_autocast_because_deepspeeds_own_is_wrong_there() -> None:
    settings = config(zero={"stage": 0}, training={"steps": 10, "precision": "bf16"})

    fields = deepspeed_config(settings, 2, 4, 10_000)

    assert fields["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert "bf16" not in fields


@pytest.mark.parametrize(
    ("num_parameters", "elements"),
    [(1_000, 1_000_000), (80_000_000, 10_000_000), (70_000_000_000, 500_000_000)],
)
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_buckets_grow_with_the_model_between_two_bounds(
    stage: int, num_parameters: int, elements: int
) -> None:
    settings = config(zero={"stage": stage})

    fields = deepspeed_config(settings, 2, 4, num_parameters)["zero_optimization"]

    assert fields["reduce_bucket_size"] == elements
    other = "stage3_prefetch_bucket_size" if stage == 3 else "allgather_bucket_size"
    assert fields[other] == elements


@pytest.fixture
def optimizer_and_model() -> tuple[Any, ReverseGPT]:
    model = ReverseGPT(config().model, 50)
    numbers = section(weight_decay=0.3, beta1=0.8, epsilon=1e-7)
    return build_optimizer(model.named_parameters(), model.shape, numbers), model


def test_weight_decay_is_on_every_matrix_and_on_nothing_else(
    optimizer_and_model: tuple[Any, ReverseGPT],
) -> None:
    optimizer, model = optimizer_and_model
    decay = {
        id(parameter): group["weight_decay"]
        for group in optimizer.param_groups
        for parameter in group["params"]
    }

    for name, parameter in model.named_parameters():
        expected = 0.0 if "norm" in name else 0.3
        assert decay[id(parameter)] == expected, name


def test_the_optimizer_has_every_parameter_once(
    optimizer_and_model: tuple[Any, ReverseGPT],
) -> None:
    optimizer, model = optimizer_and_model
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]

    assert sorted(held) == sorted(id(parameter) for parameter in model.parameters())


def test_the_optimizer_is_adamw_with_the_configs_numbers(
    optimizer_and_model: tuple[Any, ReverseGPT],
) -> None:
    optimizer, _ = optimizer_and_model

    assert isinstance(optimizer, torch.optim.AdamW)
    for group in optimizer.param_groups:
        assert (group["lr"], group["betas"], group["eps"]) == (PEAK, (0.8, 0.95), 1e-7)


def test_a_schedule_of_one_step_is_the_peak() -> None:
    assert rate_factor_at(0, 1, section()) == pytest.approx(1)
    assert math.isfinite(rate_factor_at(0, 1, section(1)))
