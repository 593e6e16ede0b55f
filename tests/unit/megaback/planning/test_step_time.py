"""Time of a step by part: laws that hold for every run, and the tables of the documentation."""

import subprocess
import sys
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megaback.config import Config
from megaback.config_file import load_config
from megaback.planning.data_facts import RunFacts
from megaback.planning.devices import cpu_device, find_device
from megaback.planning.network import exchange_rate, ring_rate
from megaback.planning.rates import ASSUMPTIONS
from megaback.planning.run_settings import Cluster, time_of
from megaback.planning.step_time import StepTime
from tests.helpers.paths import ROOT

FACTS = RunFacts(
    vocab_size=8_888, attended_tokens=500.0, total_tokens=1e11, shard_bytes=1e11, notes=()
)
H100 = find_device("h100-80gb")


def config_of(*overrides: str) -> Config:
    return load_config(ROOT / "configs" / "reverse_7b.yaml", overrides)


def parts(config: Config, cluster: Cluster) -> StepTime:
    found = time_of(config, FACTS, cluster)
    assert found is not None
    return found


@settings(max_examples=40)
@given(
    stage=st.integers(1, 3),
    nodes=st.sampled_from([1, 2, 16]),
    overlaps=st.booleans(),
    checkpointing=st.sampled_from(["none", "selective", "block"]),
    rate=st.sampled_from(["bf16_flops", "link_bytes", "network_bytes", "memory_rate"]),
)
def test_a_faster_device_never_takes_longer(
    stage: int, nodes: int, overlaps: bool, checkpointing: str, rate: str
) -> None:
    config = config_of(
        f"zero.stage={stage}",
        f"zero.overlap_communication={str(overlaps).lower()}",
        f"training.activation_checkpointing={checkpointing}",
    )
    faster = replace(H100, **{rate: 2 * getattr(H100, rate)})

    slow, fast = (parts(config, Cluster(nodes, 8, device)) for device in (H100, faster))

    assert fast.total_s <= slow.total_s
    assert min(fast.arithmetic_s, fast.memory_s, fast.host_s) > 0
    assert fast.network_s >= 0


@pytest.mark.parametrize("stage", [1, 2])
def test_overlap_hides_gradients_and_nothing_else(stage: int) -> None:
    cluster = Cluster(8, 8, H100)
    plain = parts(config_of(f"zero.stage={stage}"), cluster)
    hidden = parts(config_of(f"zero.stage={stage}", "zero.overlap_communication=true"), cluster)
    once = parts(
        config_of(
            f"zero.stage={stage}", "zero.overlap_communication=true", "zero.reduce_once=true"
        ),
        cluster,
    )

    assert plain.hidden_network_s == 0 < hidden.hidden_network_s
    sent = hidden.network_s + hidden.hidden_network_s
    assert sent == pytest.approx(plain.network_s)
    if stage == 2:
        assert once.hidden_network_s == 0


def test_recomputing_blocks_takes_a_third_more_arithmetic_of_blocks() -> None:
    cluster = Cluster(1, 8, H100)
    times = {
        kept: parts(config_of(f"training.activation_checkpointing={kept}"), cluster)
        for kept in ("none", "selective", "block")
    }

    assert times["none"].arithmetic_s == times["selective"].arithmetic_s
    assert times["none"].memory_s < times["selective"].memory_s == times["block"].memory_s
    assert times["block"].arithmetic_s / times["none"].arithmetic_s == pytest.approx(
        4 / 3, abs=0.03
    )


def test_a_ring_uses_all_network_cards_of_a_node_and_an_exchange_its_own() -> None:
    slow = H100.with_network(1e9)

    assert ring_rate(slow, 2, 8) == pytest.approx(8 * exchange_rate(slow, 2))
    assert ring_rate(slow, 1, 8) == exchange_rate(slow, 1) > 300e9
    assert ring_rate(H100.with_network(1e12), 2, 8) == ring_rate(H100, 1, 8)


def test_the_hooks_of_stage_3_slow_small_micro_batches_only() -> None:
    cluster = Cluster(8, 8, H100)

    def host_s(stage: int, rows: int) -> float:
        one_row = (f"zero.stage={stage}", f"batch.global_batch_rows={64 * rows}")
        small = ("model.width=512", "model.num_heads=4", "model.num_kv_heads=4")
        shape = ("model.mlp_width=null", f"batch.micro_batch_rows={rows}")
        return parts(config_of(*one_row, *small, *shape), cluster).host_s

    assert host_s(3, 1) > 0.1 > host_s(1, 1)
    assert host_s(3, 64) == pytest.approx(host_s(1, 64))


def test_the_time_of_unknown_devices_is_not_predicted() -> None:
    assert time_of(config_of(), FACTS, Cluster(1, 8, cpu_device(1e12, 1e12))) is None
    unknown = replace(H100, memory_rate=None)
    assert time_of(config_of(), FACTS, Cluster(1, 8, unknown)) is None


def test_documents_have_the_assumptions_and_the_published_speeds() -> None:
    planning = (ROOT / "docs" / "planning.md").read_text(encoding="utf-8")
    for one in ASSUMPTIONS.values():
        assert f"| {one.what} | {one.value:.3g} | {one.source} |" in planning

    scale = (ROOT / "docs" / "scale.md").read_text(encoding="utf-8")
    printed = subprocess.run(
        [sys.executable, ROOT / "benchmarks" / "published_speeds.py"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    table, fitted, held_out = printed.split("\n\n")
    assert table in scale
    for line in (fitted, held_out):
        assert line.split()[-3] in scale
