"""Plans of runs whose ranks share rows."""

from dataclasses import replace

import pytest

from megaback.config import Config
from megaback.config_file import load_config
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import find_device
from megaback.planning.network import exchange_rate
from megaback.planning.plan import Cluster, RunPlan, memory_of, plan_run
from tests.helpers.paths import ROOT

FACTS = RunFacts(
    vocab_size=8_888,
    attended_tokens=65_536.5,
    total_tokens=10**11,
    shard_bytes=None,
    notes=(),
)
H100S = Cluster(8, 8, find_device("h100-80gb"))
BOOKS = (
    "batch.context_tokens=131072",
    "batch.global_batch_rows=64",
    "training.activation_checkpointing=block",
)


def books(parts: int, *overrides: str) -> Config:
    divided = f"batch.sequence_parallel={parts}"
    return load_config(ROOT / "configs" / "reverse_7b.yaml", (*BOOKS, divided, *overrides))


def plan(parts: int, *overrides: str, cluster: Cluster = H100S) -> RunPlan:
    return plan_run(books(parts, *overrides), FACTS, cluster, 0.4)


def test_131072_tokens_of_7b_fit_64_h100s_in_parts_only() -> None:
    memory, room = H100S.device.memory_bytes, memory_of(books(8), FACTS, H100S)

    assert room.parts.total < memory < memory_of(books(1), FACTS, H100S).parts.total


def test_activations_are_divided_by_the_ranks_that_share_rows() -> None:
    in_2, in_8 = (memory_of(books(parts), FACTS, H100S).parts.activations for parts in (2, 8))

    assert in_2 == 4 * in_8


def test_a_step_is_the_same_work_and_more_traffic() -> None:
    whole, divided = plan(1), plan(8)

    assert divided.duration == whole.duration
    assert divided.steps == whole.steps
    # Three passes in bf16: per layer and token, 64 heads of queries and results and 16 of keys and
    # values, of 128 dimensions, 7 parts of 8 to others.
    tokens = 64 * 131_072 / 64
    expected = 3 * 32 * tokens * 2 * (64 + 16) * 128 * 7 / 8
    assert divided.traffic.total - whole.traffic.total == pytest.approx(expected)


def test_an_exchange_within_a_node_takes_its_links() -> None:
    within = plan(8)
    between = plan(8, cluster=replace(H100S, nodes=16, devices_per_node=4))
    sent, device = within.traffic.sequence.sent_bytes, H100S.device

    assert between.traffic.sequence.sent_bytes == sent
    saved_s = sent / exchange_rate(device, 16) - sent / exchange_rate(device, 1)
    assert saved_s > 0
    sequence_s = within.traffic.durations(device, 8, 8).sequence_s
    between_s = between.traffic.durations(device, 16, 4).sequence_s
    assert between_s - sequence_s == pytest.approx(saved_s)


def test_fewer_key_heads_than_ranks_are_sent_as_copies() -> None:
    few = plan(8, "model.num_kv_heads=2").traffic.sequence
    as_many = plan(8, "model.num_kv_heads=8").traffic.sequence

    assert few == as_many
