"""The search for the fastest settings: variants, their order, and messages if none fit."""

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import BatchError, ConfigError, NotEnoughMemoryError
from megaback.config import Config
from megaback.config_file import load_config
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import cpu_device, find_device
from megaback.planning.plan import fits, plan_run
from megaback.planning.run_settings import Cluster, batch_of, row_shares
from megaback.planning.search import as_overrides, search, variants, with_settings
from tests.helpers.paths import ROOT

FACTS = RunFacts(
    vocab_size=32_000, attended_tokens=2048.5, total_tokens=1e11, shard_bytes=1e11, notes=()
)


def config_of(name: str, *overrides: str) -> Config:
    return load_config(ROOT / "configs" / f"{name}.yaml", overrides)


def cluster_of(nodes: int, name: str = "h100-80gb", per_node: int = 8) -> Cluster:
    return Cluster(nodes, per_node, find_device(name))


def effective(config: Config, cluster: Cluster) -> tuple[object, ...]:
    """Settings that make a difference to a run."""
    rows, accumulation = batch_of(config, cluster)
    zero, shares = config.zero, cluster.ranks > 1
    return (
        rows,
        config.batch.sequence_parallel,
        zero.hierarchical and shares,
        config.training.activation_checkpointing,
        zero.stage,
        zero.offload,
        config.reduces_once(accumulation) and shares,
        zero.reduction if zero.stage in (1, 2) and shares else None,
        zero.overlaps_communication and shares,
    )


@settings(max_examples=12, deadline=None)
@given(
    name=st.sampled_from(["reverse_7b", "reverse_1b", "xcoax_100bt"]),
    nodes=st.sampled_from([1, 4]),
    per_node=st.sampled_from([1, 8]),
    stage=st.integers(1, 3),
    overlap=st.sampled_from(["null", "true", "false"]),
    once=st.booleans(),
)
def test_variants_are_distinct_valid_and_change_no_loss(
    name: str, nodes: int, per_node: int, stage: int, overlap: str, once: bool
) -> None:
    config = config_of(
        name,
        f"zero.stage={stage}",
        f"zero.overlap_communication={overlap}",
        f"zero.reduce_once={str(once).lower()}",
    )
    cluster = cluster_of(nodes, per_node=per_node)
    found = list(variants(config, cluster, "none"))

    kinds = [effective(changed, cluster) for _, changed in found]
    assert len(set(kinds)) == len(kinds)
    assert effective(config, cluster) in kinds
    kept = {
        "batch": {"micro_batch_rows", "sequence_parallel"},
        "training": {"activation_checkpointing"},
    }
    for changes, changed in found:
        assert Config.model_validate(changed.model_dump()) == changed
        assert changed == with_settings(config, changes)
        same = changed.model_copy(update={"zero": config.zero})
        for section, keys in kept.items():
            names = {key: getattr(getattr(config, section), key) for key in keys}
            part = getattr(same, section).model_copy(update=names)
            same = same.model_copy(update={section: part})
        assert same == config
        if overlap != "true" and changed.zero.stage < 3:
            assert not changed.zero.overlaps_communication


@settings(max_examples=6, deadline=None)
@given(
    name=st.sampled_from(["reverse_7b", "reverse_1b"]),
    nodes=st.sampled_from([1, 8]),
    device=st.sampled_from(["h100-80gb", "a100-40gb"]),
    stage=st.integers(1, 3),
    kept=st.sampled_from(["none", "selective", "block"]),
)
def test_the_choice_fits_is_not_slower_than_the_config_and_chooses_itself(
    name: str, nodes: int, device: str, stage: int, kept: str
) -> None:
    config = config_of(name, f"zero.stage={stage}", f"training.activation_checkpointing={kept}")
    cluster = cluster_of(nodes, device)

    found = search(config, FACTS, cluster)
    best = found.fastest[0]

    assert fits(best.config, FACTS, cluster)
    plan = plan_run(best.config, FACTS, cluster)
    assert plan.parts == best.time
    assert plan.memory == best.memory
    assert found.given is not None
    if fits(config, FACTS, cluster):
        assert best.time.total_s <= found.given.time.total_s
    assert found == search(config, FACTS, cluster)
    again = search(best.config, FACTS, cluster)
    assert again.fastest[0].changes == {}
    times = [one.time.total_s for one in found.fastest]
    assert all(after >= 0.99 * before for before, after in pairwise(times))


def test_offload_is_chosen_only_where_nothing_else_fits() -> None:
    config = config_of("reverse_7b", "optimizer.name=adamw", "zero.offload=none")
    alone = cluster_of(1, per_node=1)

    best = search(config, FACTS, alone).fastest[0]

    assert best.config.zero.offload != "none"
    assert best.time.host_s > 0.01
    eight = search(config, FACTS, cluster_of(1)).fastest
    assert {one.config.zero.offload for one in eight} == {"none"}
    given_offload = with_settings(config, {"zero.offload": "optimizer"})
    assert search(given_offload, FACTS, cluster_of(1)).fastest[0].changes["zero.offload"] == "none"


def test_ranks_share_rows_that_are_long_and_fit_in_no_other_way() -> None:
    long = ("batch.context_tokens=131072", "batch.global_batch_rows=64")
    config, cluster = config_of("reverse_7b", *long), cluster_of(8)

    best = search(config, FACTS, cluster).fastest[0]

    assert 8 % best.changes["batch.sequence_parallel"] == 0  # type: ignore[operator]
    assert not fits(with_settings(best.config, {"batch.sequence_parallel": 1}), FACTS, cluster)
    short = {
        one.batch.sequence_parallel for _, one in variants(config_of("reverse_7b"), cluster, "none")
    }
    assert short == {1}


def test_ranks_that_do_not_divide_a_batch_of_long_rows_may_share_them() -> None:
    config = config_of("reverse_7b", "batch.context_tokens=131072", "batch.global_batch_rows=16")

    found = search(config, FACTS, cluster_of(8))

    assert found.given is None
    assert {one.changes["batch.sequence_parallel"] for one in found.fastest} <= {4, 8}


def test_ranks_share_no_rows_of_which_bad_frames_are_skipped() -> None:
    config = config_of("reverse_7b", "batch.context_tokens=131072")
    skipping = config_of("reverse_7b", "batch.context_tokens=131072", "data.on_bad_frame=skip")

    assert len(row_shares(config, 64, 8)) > 1
    assert row_shares(skipping, 64, 8) == [1]


def test_sharding_by_node_is_tried_on_several_nodes_without_offload() -> None:
    config = config_of("reverse_1b")

    def hierarchical(nodes: int, offload: str) -> set[bool]:
        found = variants(config, cluster_of(nodes), offload)
        return {changed.zero.hierarchical for _, changed in found}

    assert hierarchical(2, "none") == {False, True}
    assert hierarchical(1, "none") == hierarchical(2, "optimizer") == {False}
    given = with_settings(config, {"zero.hierarchical": True})
    changes, _ = next(variants(given, cluster_of(2), "optimizer"))
    assert changes["zero.hierarchical"] is False


def test_stage_zero_in_bf16_is_neither_left_nor_entered() -> None:
    cluster = cluster_of(1)

    def stages(*overrides: str) -> set[int]:
        config = config_of("reverse_1b", *overrides)
        return {changed.zero.stage for _, changed in variants(config, cluster, "none")}

    assert stages("zero.stage=0") == {0}
    assert stages("zero.stage=2") == {1, 2, 3}
    assert stages("zero.stage=2", "training.precision=fp32") == {0, 1, 2, 3}
    assert stages("zero.stage=1", "training.compile=on") == {1, 2}


def test_of_equally_fast_settings_the_one_with_fewer_changes_is_first() -> None:
    config = config_of("xcoax_100bt", "zero.stage=1", "hardware.device=cuda")
    found = search(config, FACTS, cluster_of(1, per_node=1), count=100)

    assert all("zero.reduction" not in one.changes for one in found.fastest)
    assert "zero.stage" not in found.fastest[0].changes


@pytest.mark.parametrize("name", ["xcoax_100bt", "reverse_1b"])
def test_a_config_within_a_percent_of_the_fastest_settings_stays(name: str) -> None:
    cluster = cluster_of(1)
    found = search(config_of(name, "hardware.device=cuda"), FACTS, cluster, count=1000).fastest
    fastest_s = min(one.time.total_s for one in found)
    tied = [one for one in found if 1.003 < one.time.total_s / fastest_s < 1.0099]

    assert tied
    for one in tied:
        assert search(one.config, FACTS, cluster).fastest[0].changes == {}


def test_if_nothing_fits_the_nearest_settings_and_enough_nodes_are_named() -> None:
    config = config_of("reverse_1b")
    small = replace(find_device("a100-40gb"), memory_bytes=6e9)

    with pytest.raises(NotEnoughMemoryError) as raised:
        search(config, FACTS, Cluster(1, 1, small))
    message = str(raised.value)

    assert "no settings fit runs/reverse_1b into the 6.0 GB of each of 1 x 1 a100-40gb" in message
    nearest, _, larger = message.partition(" GB: ")[2].partition("; --nodes ")
    assert nearest.startswith("zero.stage=3 zero.offload=parameters")
    nodes, *overrides = larger.removesuffix(" fits").split()
    assert fits(config_of("reverse_1b", *overrides), FACTS, Cluster(int(nodes), 1, small))
    assert not fits(config_of("reverse_1b", *overrides), FACTS, Cluster(1, 1, small))

    with pytest.raises(NotEnoughMemoryError, match="use a smaller model"):
        search(config, FACTS, Cluster(1, 1, replace(small, memory_bytes=1e9)))


def test_a_batch_that_the_ranks_do_not_divide_and_a_cpu_are_refused() -> None:
    config = config_of("reverse_7b")

    with pytest.raises(BatchError, match="not divisible by 24 ranks"):
        search(config, FACTS, cluster_of(3))
    with pytest.raises(ConfigError, match="on cpu cannot be predicted; choose settings for a GPU"):
        search(config, FACTS, Cluster(1, 8, cpu_device(1e12, None)))


def test_changes_are_written_as_overrides() -> None:
    assert as_overrides({"zero.stage": 2, "zero.reduce_once": True}) == (
        "zero.stage=2 zero.reduce_once=true"
    )


def test_the_documentation_has_the_choices_of_three_models() -> None:
    printed = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "choices.py"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout

    assert printed in (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
