"""Bytes of the gradients' reductions and all calls: planned, and of a rehearsed rank of 8."""

from pathlib import Path

import pytest

from megaback.config import Config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import cpu_device
from megaback.planning.plan import plan_run
from megaback.planning.run_settings import Cluster
from megaback.rehearsal.job import Job, rehearsal_config, rehearse
from megaback.rehearsal.report import RankReport

pytestmark = pytest.mark.slow

RANKS, RANK = 8, 5
CASES: dict[str, dict[str, object]] = {
    "1": {"stage": 1},
    "1 fp32": {"stage": 1, "gradient_precision": "fp32"},
    "1 reduce": {"stage": 1, "reduction": "reduce"},
    "2 fp32": {"stage": 2, "gradient_precision": "fp32"},
    "2 once": {"stage": 2, "reduce_once": True},
    "2 fp32 reduce once": {
        "stage": 2,
        "gradient_precision": "fp32",
        "reduction": "reduce",
        "reduce_once": True,
    },
    "3 fp32": {"stage": 3, "gradient_precision": "fp32"},
    "3 once": {"stage": 3, "reduce_once": True},
}


def config_of(shards: Path, zero: dict[str, object]) -> Config:
    """A run in bf16 with three micro-batches per step."""
    config = Config.model_validate(
        {
            "run": "unused",
            "data": {"shards": str(shards)},
            "model": {"num_layers": 2, "width": 256, "num_heads": 4},
            "batch": {"context_tokens": 64, "global_batch_rows": 3 * RANKS, "micro_batch_rows": 1},
            "optimizer": {"learning_rate": 1e-3},
            "training": {"steps": 100, "precision": "bf16"},
            "zero": zero,
        }
    )
    return rehearsal_config(config, 2, None)


@pytest.fixture(scope="module")
def reports(tiny_shards: Path) -> dict[str, RankReport]:
    jobs = [Job(config_of(tiny_shards, zero), (RANK,), RANKS, 8) for zero in CASES.values()]
    found = dict(zip(CASES, rehearse(*jobs), strict=True))
    assert all(isinstance(report, RankReport) for report in found.values())
    return found


@pytest.mark.parametrize("case", CASES)
def test_calls_and_bytes_of_gradients_are_those_of_the_plan(
    case: str, reports: dict[str, RankReport], tiny_shards: Path
) -> None:
    config = config_of(tiny_shards, CASES[case])
    facts = run_facts(config, None, None)

    plan = plan_run(config, facts, Cluster(1, RANKS, cpu_device(1.0, None)), 0.4, RANK)

    traffic, counted = plan.traffic, [one for one in reports[case].traffic if one.group == "engine"]
    sent = {one.kind: one.sent_bytes for one in counted}
    assert sent[traffic.reduction] == pytest.approx(traffic.gradient_bytes, rel=0.02)
    calls = {(one.group, one.kind): one.calls for one in counted}
    assert calls == plan.calls.by_group(traffic)
