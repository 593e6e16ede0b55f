"""Traffic and memory of `zero.hierarchical`: planned, and of a rehearsed rank of 4 nodes of 4."""

from pathlib import Path

import pytest

from launcher.rehearse import planned_bytes, planned_memory
from megaback.config import Config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import cpu_device
from megaback.planning.plan import Cluster, RunPlan, plan_run
from megaback.rehearsal.job import Job, rehearsal_config, rehearse
from megaback.rehearsal.report import RankReport

pytestmark = pytest.mark.slow

NODES, PER_NODE, RANK = 4, 4, 9
RANKS = NODES * PER_NODE
Case = tuple[int, str, int]
CASES: list[Case] = [(1, "muon", 2), (2, "adamw", 2), (2, "adamw", 8), (3, "muon", 2)]
"""ZeRO stage, optimizer and micro-batches per step."""
_FEW_BYTES = 1_000
"""Bytes of norms and counters."""
_LIBRARIES_BYTES = 40e6
"""Memory of libraries that a rank loads itself, which is not planned: 32 to 38 MB were measured."""


def config_of(shards: Path, stage: int, optimizer: str, micro_batches: int) -> Config:
    """A run whose matrices are too large to stay gathered at stage 3."""
    rows = RANKS * micro_batches
    config = Config.model_validate(
        {
            "run": "unused",
            "data": {"shards": str(shards)},
            "model": {"num_layers": 2, "width": 512, "num_heads": 4},
            "batch": {"context_tokens": 64, "global_batch_rows": rows, "micro_batch_rows": 1},
            "optimizer": {"name": optimizer, "learning_rate": 1e-3},
            "training": {"steps": 100, "precision": "bf16"},
            "zero": {"stage": stage, "hierarchical": True},
        }
    )
    return rehearsal_config(config, 2, None)


@pytest.fixture(scope="module")
def rehearsed(tiny_shards: Path) -> dict[Case, tuple[RankReport, RunPlan]]:
    """Reports and plans."""
    configs = {case: config_of(tiny_shards, *case) for case in CASES}
    jobs = [Job(config, (RANK,), RANKS, PER_NODE, True) for config in configs.values()]
    cluster = Cluster(NODES, PER_NODE, cpu_device(1.0, None))
    found = {}
    for (case, config), report in zip(configs.items(), rehearse(*jobs), strict=True):
        assert isinstance(report, RankReport)
        facts = run_facts(config, None, None)
        found[case] = (report, plan_run(config, facts, cluster, 0.4, RANK))
    return found


@pytest.mark.parametrize("case", CASES)
def test_bytes_within_and_between_nodes_are_those_of_the_plan(
    case: Case, rehearsed: dict[Case, tuple[RankReport, RunPlan]]
) -> None:
    report, plan = rehearsed[case]
    sent = {
        (one.group, one.kind): one.sent_bytes
        for one in report.traffic
        if one.group != "control" and one.sent_bytes > _FEW_BYTES
    }

    assert sent == pytest.approx(planned_bytes(plan), rel=1e-3)
    assert {group for group, _ in sent} == {"node", "engine"}


@pytest.mark.parametrize("case", CASES)
def test_collectives_are_as_many_as_planned(
    case: Case, rehearsed: dict[Case, tuple[RankReport, RunPlan]]
) -> None:
    report, plan = rehearsed[case]

    calls = {(one.group, one.kind): one.calls for one in report.traffic if one.group != "control"}

    assert calls == plan.calls.by_group(plan.traffic)


def test_nodes_exchange_gradients_once_per_step(
    rehearsed: dict[Case, tuple[RankReport, RunPlan]],
) -> None:
    reports = [rehearsed[2, "adamw", micro_batches][0] for micro_batches in (2, 8)]

    two, eight = (
        {(one.group, one.kind): (one.calls, one.sent_bytes) for one in report.traffic}
        for report in reports
    )
    assert two["engine", "all-reduce"] == eight["engine", "all-reduce"]
    assert eight["node", "all-reduce"][0] > 3 * two["node", "all-reduce"][0]


@pytest.mark.parametrize("case", CASES)
def test_a_node_holds_all_of_the_state_at_stages_1_and_2(
    case: Case, rehearsed: dict[Case, tuple[RankReport, RunPlan]]
) -> None:
    (report, plan), stage = rehearsed[case], case[0]
    shards = PER_NODE if stage < 3 else RANKS

    assert report.ownership.problems == ()
    assert report.ownership.max_weights < 1.1 * plan.size.total / shards
    planned = planned_memory(plan)["training"]
    assert planned < report.memory_training_bytes < 1.1 * planned + _LIBRARIES_BYTES
    # Each writes its part, whatever it holds.
    written = sum(report.checkpoint.values())
    assert written == pytest.approx(plan.checkpoint_bytes / RANKS, rel=0.2)
