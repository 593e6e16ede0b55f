"""New configs for sizes and machines: each fits, is planned, and is what its file says."""

from pathlib import Path

import pytest

from data_pipeline.errors import ConfigError, NotEnoughMemoryError
from megaback.config_file import load_config
from megaback.planning.budget import Budget
from megaback.planning.config_text import config_text
from megaback.planning.data_summary import DataSummary
from megaback.planning.devices import cpu_device, find_device
from megaback.planning.new_config import NewConfig, new_config
from megaback.planning.plan import plan_run, require_room
from megaback.planning.run_settings import Cluster

CPU = Cluster(1, 1, cpu_device(256e9, None))
H100 = Cluster(1, 1, find_device("h100-80gb"))
MANY_H100S = Cluster(8, 8, find_device("h100-80gb"))
NONE_YET = DataSummary.assumed(None)


def made_for(cluster: Cluster, data: DataSummary = NONE_YET, **budget: float) -> NewConfig:
    return new_config(Budget(**budget), data, cluster, "runs/new")


@pytest.mark.parametrize("parameters", [1e6, 1e7, 124e6, 1e9, 7e9], ids="{:.3g}".format)
@pytest.mark.parametrize("cluster", [CPU, H100, MANY_H100S], ids=lambda cluster: cluster.shown)
def test_a_config_is_planned_and_its_file_is_the_same(
    parameters: float, cluster: Cluster, tmp_path: Path
) -> None:
    made = made_for(cluster, parameters=parameters)
    config = made.config
    plan = plan_run(config, made.facts, cluster, 0.4)

    require_room(config, made.facts, cluster, plan)
    assert plan.steps == config.training.steps
    assert plan.micro_batch_rows == config.batch.micro_batch_rows
    assert config.batch.global_batch_rows % cluster.ranks == 0
    assert (config.training.precision == "bf16") == (cluster is not CPU)
    path = tmp_path / "new.yaml"
    path.write_text(config_text(made.choices, ["for a test"]))
    assert load_config(path) == config
    assert made_for(cluster, parameters=parameters) == made


def test_large_models_save_memory_only_as_they_must() -> None:
    small, large, crowded = (
        made_for(cluster, parameters=size).config
        for cluster, size in ((MANY_H100S, 124e6), (MANY_H100S, 7e9), (H100, 7e9))
    )
    assert (small.zero.stage, small.training.activation_checkpointing) == (1, "none")
    assert large.training.activation_checkpointing == "selective"
    assert (large.zero.offload, large.optimizer.name) == ("none", "muon")
    assert crowded.zero.offload != "none"


def test_a_model_that_does_not_fit_is_refused() -> None:
    with pytest.raises(NotEnoughMemoryError, match="does not fit 1 x 1 cpu"):
        made_for(Cluster(1, 1, cpu_device(16e9, None)), parameters=7e9)


def test_a_batch_above_the_ladders_is_explained() -> None:
    made = made_for(CPU, parameters=1e7, seconds=240.0, sustained_flops=5e10)

    (reason,) = (one.reason for one in made.choices if one.key == "batch.global_batch_rows")
    assert made.config.batch.global_batch_rows == 4
    assert reason.endswith("with which Muon's update would be over a third of a step")


def test_a_budget_for_hardly_a_step_is_refused() -> None:
    with pytest.raises(ConfigError, match="suffices for"):
        made_for(CPU, flops=1e9)


def test_more_ranks_than_the_batch_needs_are_named_and_raise_the_rate() -> None:
    alone, many = made_for(H100, parameters=1e6), made_for(MANY_H100S, parameters=1e6)

    assert many.config.batch.global_batch_rows == 64
    assert many.config.optimizer.learning_rate > alone.config.optimizer.learning_rate
    few = DataSummary(shards="few", vocab_size=4096, train_tokens=100_000)
    crowded = made_for(MANY_H100S, few, parameters=1e6)
    assert any("64 ranks need a larger batch" in note for note in crowded.notes)
    assert any("the data set limits the run to 400,000 tokens" in note for note in crowded.notes)


def test_widths_transfer_by_mup_where_embeddings_are_not_tied() -> None:
    for size, is_tied in ((1e6, True), (124e6, False)):
        model = made_for(CPU, parameters=size).config.model
        assert model.tie_embeddings is is_tied
        assert model.base_width == (None if is_tied else model.width)


def test_every_value_that_is_chosen_by_a_rule_has_its_source() -> None:
    reasons = {one.key: one.reason for one in made_for(H100, parameters=124e6).choices}

    assert "OLMo-core" in reasons["optimizer.learning_rate"]
    assert "OLMo-core" in reasons["batch.global_batch_rows"]
    assert "nanochat" in reasons["training.steps"]
    assert "Yang" in reasons["model.base_width"]
