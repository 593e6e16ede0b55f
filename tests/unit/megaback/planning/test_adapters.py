"""The plan of a run with LoRA against that of full fine-tuning, and against the model."""

import pytest

from megaback.config import Config, ModelSection
from megaback.config_finetune import LoraSection
from megaback.planning.adapters import adapter_shapes, factors_of_matrices, num_trained
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import find_device
from megaback.planning.plan import plan_run
from megaback.planning.run_settings import Cluster

SHAPE = ModelSection(num_layers=2, width=48, num_heads=4, num_kv_heads=2, mlp_width=96)
LORA = LoraSection(rank=4, target_modules=("v_proj", "down_proj"))


def test_factors_have_the_names_and_shapes_of_their_matrices() -> None:
    shapes = adapter_shapes(SHAPE, LORA)

    assert list(shapes)[:4] == [
        "model.layers.0.self_attn.v_proj.lora_A.default.weight",
        "model.layers.0.self_attn.v_proj.lora_B.default.weight",
        "model.layers.0.mlp.down_proj.lora_A.default.weight",
        "model.layers.0.mlp.down_proj.lora_B.default.weight",
    ]
    assert list(shapes.values())[:4] == [(4, 48), (24, 4), (4, 96), (48, 4)]
    assert num_trained(SHAPE, LORA) == 2 * 4 * (48 + 24 + 96 + 48)
    factors = factors_of_matrices(SHAPE, LORA)
    assert [name for both in factors.values() for name in both] == list(shapes)
    assert next(iter(factors)) == "model.layers.0.self_attn.v_proj.weight"


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_the_plan_has_no_gradients_and_no_optimizer_state_of_frozen_weights(stage: int) -> None:
    fields = {
        "run": "run",
        "init_from": "base",
        "data": {"shards": "shards"},
        "model": {"num_layers": 12, "width": 1024, "num_heads": 16},
        "batch": {"context_tokens": 1024, "global_batch_rows": 16, "micro_batch_rows": 2},
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 10},
        "zero": {"stage": stage},
    }
    facts = RunFacts(
        vocab_size=32_000, attended_tokens=512.0, total_tokens=1e6, shard_bytes=None, notes=()
    )
    cluster = Cluster(1, 8, find_device("h100-80gb"))
    full, lora = (
        plan_run(Config.model_validate(fields | more), facts, cluster)
        for more in ({}, {"finetune": {"lora": {"rank": 16}}})
    )

    part = lora.size.trained / full.size.total
    assert part < 0.01
    assert lora.size.total == full.size.total + lora.size.adapters
    of_full, of_lora = full.stages[stage].parts, lora.stages[stage].parts
    assert of_lora.optimizer == pytest.approx(part * of_full.optimizer)
    assert of_lora.gradients < 0.05 * max(of_full.gradients, 1e9)
    assert of_lora.activations < of_full.activations
    assert of_lora.total < 0.85 * of_full.total
    assert lora.traffic.gradient_bytes == pytest.approx(part * full.traffic.gradient_bytes)
    assert lora.checkpoint_bytes == 12 * lora.size.trained
    assert lora.flops_per_token < 0.8 * full.flops_per_token
    assert lora.parts is not None
    assert full.parts is not None
    assert lora.parts.arithmetic_s < full.parts.arithmetic_s
