"""Rehearsed ranks of 512: real engines of a tiny model at every ZeRO stage, in one process."""

from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.errors import BatchError, CheckpointMissingError, ConfigError
from megaback.config import Config
from megaback.planning.data_facts import run_facts
from megaback.planning.devices import cpu_device
from megaback.planning.plan import RunPlan, plan_run
from megaback.planning.run_settings import Cluster
from megaback.rehearsal.job import Job, parse_ranks, rehearsal_config, rehearse
from megaback.rehearsal.report import RankFailure, RankReport
from megaback.rehearsal.rows import check_rows

RANKS, RANK = 512, 300
Case = tuple[int, str, str]
CASES: list[Case] = [
    (0, "muon", "fp32"),
    (1, "adamw", "fp32"),
    (1, "muon", "fp32"),
    (2, "adamw", "bf16"),
    (3, "adamw", "fp32"),
    (3, "muon", "bf16"),
]
"""ZeRO stage, optimizer and precision. Rank 300 owns no matrix at stages 1 and 3."""


def config_at_scale(shards: Path, stage: int, optimizer: str, precision: str) -> Config:
    """A run of one row per rank and step, as it is rehearsed."""
    config = Config.model_validate(
        {
            "run": "unused",
            "data": {"shards": str(shards)},
            "model": {"num_layers": 2, "width": 32, "num_heads": 4},
            "batch": {"context_tokens": 64, "global_batch_rows": RANKS, "micro_batch_rows": 1},
            "optimizer": {"name": optimizer, "learning_rate": 1e-3},
            "training": {"steps": 100, "precision": precision},
            "zero": {"stage": stage},
        }
    )
    return rehearsal_config(config, 2, None)


def plan_of(config: Config) -> RunPlan:
    cluster = Cluster(64, 8, cpu_device(1.0, None))
    return plan_run(config, run_facts(config, None, None), cluster, 0.4, RANK)


@pytest.fixture(scope="module")
def rehearsed(tiny_shards: Path) -> dict[Case, tuple[RankReport, RunPlan]]:
    """Rank 300 of 512 and its plan; a rank that fails does not end the others."""
    configs = [config_at_scale(tiny_shards, *case) for case in CASES]
    failing = configs[0].model_copy(update={"init_from": Path("none")})
    jobs = [Job(config, (RANK,), RANKS, 8) for config in [failing, *configs]]
    # Of fp32: some CPUs multiply bf16 with oneDNN, whose kernels take tens of megabytes.
    skipping = replace(jobs[1], skip_arithmetic=True)
    failure, *reports, skipped = rehearse(*jobs, skipping)
    assert isinstance(failure, RankFailure)
    assert isinstance(failure.error, CheckpointMissingError)
    found = {}
    for case, config, report in zip(CASES, configs, reports, strict=True):
        assert isinstance(report, RankReport)
        found[case] = (report, plan_of(config))
    assert isinstance(skipped, RankReport)
    assert_same_but_for_time(skipped, found[CASES[0]][0])
    return found


def assert_same_but_for_time(skipped: RankReport, computed: RankReport) -> None:
    assert skipped.traffic == computed.traffic
    assert (skipped.owned, skipped.checkpoint) == (computed.owned, computed.checkpoint)
    # What is measured is mostly the libraries' own memory.
    measured = computed.memory_training_bytes
    assert skipped.memory_training_bytes == pytest.approx(measured, rel=0.4)


@pytest.mark.parametrize("case", CASES)
def test_a_rank_owns_its_part_of_all_parameters(
    rehearsed: dict[Case, tuple[RankReport, RunPlan]], case: Case
) -> None:
    (report, plan), (stage, optimizer, _) = rehearsed[case], case
    total, owned = plan.size.total, report.ownership
    assert (report.rank, owned.parameters, owned.problems) == (RANK, total, ())
    assert owned.min_weights <= report.owned.weights <= owned.max_weights
    assert report.owned.gradients == (report.owned.weights if stage > 1 else total)
    if stage == 0:
        assert (report.owned.weights, report.owned.matrices) == (total, 14)
    else:
        assert owned.max_weights < 1.1 * total / RANKS + 32
        states = 8 if optimizer == "adamw" else 4
        assert states * report.owned.weights <= report.owned.optimizer_bytes
        assert report.owned.matrices == 0
    if stage and optimizer == "muon":
        assert (owned.matrices, owned.ranks_without_matrices) == (14, RANKS - 14)
        assert owned.first_without_matrices is not None


@pytest.mark.parametrize("case", CASES)
def test_collectives_are_those_of_the_plan(
    rehearsed: dict[Case, tuple[RankReport, RunPlan]], case: Case
) -> None:
    """Up to padding, and the norms' and counters' few bytes."""
    (report, plan), (stage, _, _) = rehearsed[case], case
    sent = {one.kind: one.sent_bytes for one in report.traffic if one.group == "engine"}
    reduction = "reduce-scatter" if stage == 3 else "all-reduce"
    # Stage 3 pads every parameter to a multiple of the ranks.
    assert sent[reduction] == pytest.approx(plan.traffic.gradient_bytes, rel=0.1)
    assert sent.get("all-gather", 0) == pytest.approx(plan.traffic.weight_bytes, rel=0.1)
    # A rank without matrices sends its slices to their owners, and returns nothing.
    assert sent.get("all-to-all", 0) == plan.traffic.optimizer_bytes


@pytest.mark.parametrize("case", CASES)
def test_control_messages_of_a_step_do_not_grow_with_the_ranks(
    rehearsed: dict[Case, tuple[RankReport, RunPlan]], case: Case
) -> None:
    control = [one for one in rehearsed[case][0].traffic if one.group == "control"]
    assert [(one.kind, one.calls) for one in control] == [("all-reduce", 1)]
    assert control[0].sent_bytes <= 2 * 2 * 8  # two numbers


@pytest.mark.parametrize("case", CASES)
def test_rows_memory_and_checkpoint_are_measured(
    rehearsed: dict[Case, tuple[RankReport, RunPlan]], case: Case
) -> None:
    (report, plan), (stage, optimizer, _) = rehearsed[case], case
    assert (report.first_batch.rows, report.first_batch.lanes) == (1, 1)
    assert report.first_batch.read_bytes > 0
    planned = max(
        num_bytes
        for moment, num_bytes in plan.memory.allocated.items()
        if moment not in ("start", "saving")
    )
    assert report.memory_saving_bytes >= report.memory_training_bytes > planned
    assert report.memory_start_bytes > plan.memory.allocated["start"]
    assert sorted(report.checkpoint) == [
        f"optimizer-{RANK:05d}.safetensors",
        f"weights-{RANK:05d}.safetensors",
    ]
    if stage:
        states = 12 if optimizer == "adamw" else 8
        assert sum(report.checkpoint.values()) > states * report.owned.weights


def test_the_rows_of_512_ranks_are_those_of_the_steps(tiny_shards: Path) -> None:
    config = config_at_scale(tiny_shards, 1, "adamw", "fp32")
    assert check_rows(config, RANKS, 2).problems == ()
    with pytest.raises(BatchError, match="500 ranks"):
        check_rows(config, 500, 1)


def test_a_branch_with_lora_is_rehearsed_as_a_new_run_on_the_trunk(tiny_shards: Path) -> None:
    fields = config_at_scale(tiny_shards, 1, "adamw", "fp32").model_dump(mode="json")
    branch = {"branch_from": "trunk", "keep": ["weights"], "finetune": {"lora": {"rank": 4}}}
    config = rehearsal_config(Config.model_validate(fields | branch), 2, None)

    rehearsed = Job.parse(Job(config, (0,), 2, 2).to_json()).config

    assert (rehearsed.init_from, rehearsed.branch_from) == (Path("trunk"), None)


def test_ranks_are_numbers_or_all() -> None:
    assert parse_ranks(None, 8) == (0, 7)
    assert parse_ranks(None, 1) == (0,)
    assert parse_ranks("all", 3) == (0, 1, 2)
    assert parse_ranks("2, 0,2", 3) == (2, 0)
    for text in ("3", "-1", "one", "", "1,"):
        with pytest.raises(ConfigError, match="from 0 to 2"):
            parse_ranks(text, 3)
