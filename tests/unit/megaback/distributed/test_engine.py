"""Translation of our config into DeepSpeed's."""

from typing import Any

import pytest

from megaback.config import Config
from megaback.distributed.engine import deepspeed_config


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
def test_an_offloaded_optimizer_is_on_the_host_and_is_not_deepspeeds(stage: int) -> None:
    fields = deepspeed_config(config(zero={"stage": stage, "offload": "optimizer"}), 2, 4, 10_000)

    assert fields["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert fields["zero_force_ds_cpu_optimizer"] is False


def test_offloading_parameters_offloads_the_optimizer_too() -> None:
    fields = deepspeed_config(config(zero={"stage": 3, "offload": "parameters"}), 2, 4, 10_000)

    assert fields["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert fields["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}


def test_deepspeed_gets_micro_batch_accumulation_and_clipping() -> None:
    fields = deepspeed_config(config(), 2, 4, 10_000)

    assert fields["train_micro_batch_size_per_gpu"] == 2
    assert fields["gradient_accumulation_steps"] == 4
    assert fields["gradient_clipping"] == 0.7


def test_clipping_can_be_disabled() -> None:
    optimizer = {"learning_rate": 1e-3, "gradient_clip": 0}

    assert deepspeed_config(config(optimizer=optimizer), 2, 4, 10_000)["gradient_clipping"] == 0


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_deepspeed_gets_the_zero_stage(stage: int) -> None:
    fields = deepspeed_config(config(zero={"stage": stage}), 2, 4, 10_000)

    assert fields["zero_optimization"]["stage"] == stage


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_fp32_enables_no_other_precision_in_deepspeed(stage: int) -> None:
    fields = deepspeed_config(config(zero={"stage": stage}), 2, 4, 10_000)

    assert not fields.keys() & {"bf16", "fp16", "torch_autocast"}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_bf16_is_deepspeeds_own_where_the_optimizer_is_sharded(stage: int) -> None:
    settings = config(zero={"stage": stage}, training={"steps": 10, "precision": "bf16"})

    fields = deepspeed_config(settings, 2, 4, 10_000)

    assert fields["bf16"] == {"enabled": True, "check_grad_overflow": False}


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["bf16", "fp32"])
@pytest.mark.parametrize("gradient_precision", ["bf16", "fp32"])
def test_gradients_have_a_precision_of_their_own_only_beside_weights_in_bf16(
    stage: int, precision: str, gradient_precision: str
) -> None:
    settings = config(
        zero={"stage": stage, "gradient_precision": gradient_precision},
        training={"steps": 10, "precision": precision},
    )

    fields = deepspeed_config(settings, 2, 4, 10_000)

    is_fp32 = stage > 0 and (precision, gradient_precision) == ("bf16", "fp32")
    assert fields.get("communication_data_type") == ("fp32" if is_fp32 else None)
    assert fields.get("data_types") == ({"grad_accum_dtype": "fp32"} if is_fp32 else None)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("chosen", [None, True, False])
def test_communication_overlaps_at_stage_3_unless_the_config_decides(
    stage: int, chosen: bool | None
) -> None:
    settings = config(zero={"stage": stage, "overlap_communication": chosen})

    fields = deepspeed_config(settings, 2, 4, 10_000)["zero_optimization"]

    assert fields["overlap_comm"] == (stage == 3 if chosen is None else chosen)


@pytest.mark.parametrize("reduction", ["all_reduce", "reduce"])
def test_gradients_are_reduced_by_the_collective_of_the_config(reduction: str) -> None:
    fields = deepspeed_config(config(zero={"reduction": reduction}), 2, 4, 10_000)

    of_all = fields["zero_optimization"]["use_multi_rank_bucket_allreduce"]
    assert of_all == (reduction == "all_reduce")


def test_bf16_without_sharding_is_autocast_because_deepspeeds_own_is_incorrect_there() -> None:
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
