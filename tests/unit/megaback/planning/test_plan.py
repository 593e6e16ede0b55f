"""Plans of runs, and the smallest change for a run that does not fit."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.planning.data_facts import RunFacts, run_facts
from megaback.planning.devices import DEVICES, cpu_device, devices_named_like, find_device
from megaback.planning.network import step_traffic
from megaback.planning.plan import fits, memory_of, plan_run, smallest_change
from megaback.planning.run_settings import Cluster
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"
FACTS = RunFacts(
    vocab_size=8_888, attended_tokens=500.0, total_tokens=1e11, shard_bytes=1e11, notes=()
)
RunMegaback = Callable[..., subprocess.CompletedProcess[str]]


def config_of(name: str = "reverse_7b", *overrides: str) -> Config:
    return load_config(CONFIGS / f"{name}.yaml", overrides)


def h100s(nodes: int) -> Cluster:
    return Cluster(nodes, 8, find_device("h100-80gb"))


def changed(config: Config, cluster: Cluster, words: str) -> tuple[Config, Cluster]:
    """The config and cluster with the overrides of `smallest_change` applied."""
    name, *arguments = words.split(" --nodes ")
    if words.startswith("--nodes "):
        name, arguments = "", [words.removeprefix("--nodes ")]
    for override in name.split():
        section, _, rest = override.partition(".")
        key, _, value = rest.partition("=")
        part = getattr(config, section)
        typed = type(getattr(part, key))(value)
        config = config.model_copy(update={section: part.model_copy(update={key: typed})})
    nodes = int(arguments[0]) if arguments else cluster.nodes
    return config, Cluster(nodes, cluster.devices_per_node, cluster.device)


def test_memory_per_rank_never_grows_with_the_number_of_devices() -> None:
    totals = [memory_of(config_of(), FACTS, h100s(nodes)).parts.total for nodes in (1, 4, 16, 32)]

    assert totals == sorted(totals, reverse=True)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_higher_stage_holds_no_more_weights_gradients_and_state(optimizer: str) -> None:
    config = config_of("reverse_7b", f"optimizer.name={optimizer}")
    plan = plan_run(config, FACTS, h100s(8), 0.4)

    held = [
        memory.parts.weights + memory.parts.gradients + memory.parts.optimizer
        for memory in plan.stages.values()
    ]

    assert held == sorted(held, reverse=True)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (("zero.stage=1", "batch.micro_batch_rows=1", "optimizer.name=adamw"), "zero.stage=2"),
        (("zero.stage=2", "batch.micro_batch_rows=8"), "batch.micro_batch_rows=2"),
    ],
    ids=["stage", "micro-batch"],
)
def test_the_smallest_change_is_the_cheapest_one(overrides: tuple[str, ...], expected: str) -> None:
    config, cluster = config_of("reverse_7b", *overrides), h100s(2)
    memory = memory_of(config, FACTS, cluster).parts.total
    tight = Cluster(2, 8, find_device("h100-80gb", memory * 0.9))

    words = smallest_change(config, FACTS, tight if expected == "zero.stage=2" else cluster)

    assert words == expected


def long_rows(rows: int) -> Config:
    """7B with rows that are too long for a device, in micro-batches of some of them."""
    return config_of(
        "reverse_7b",
        "batch.context_tokens=131072",
        "batch.global_batch_rows=64",
        f"batch.micro_batch_rows={rows}",
        "training.activation_checkpointing=block",
    )


def test_ranks_share_a_row_that_is_too_long_for_a_device() -> None:
    cluster = h100s(8)

    assert smallest_change(long_rows(1), FACTS, cluster) == "batch.sequence_parallel=2"
    assert fits(*changed(long_rows(1), cluster, "batch.sequence_parallel=2")[:1], FACTS, cluster)
    smaller = smallest_change(long_rows(8), FACTS, h100s(1)) or ""
    assert "batch.sequence_parallel" in smaller


def test_ranks_share_no_rows_of_which_one_fits() -> None:
    config, cluster = config_of("reverse_7b", "batch.micro_batch_rows=8"), h100s(2)

    assert "sequence_parallel" not in (smallest_change(config, FACTS, cluster) or "")


@given(
    stage=st.integers(0, 3),
    rows=st.sampled_from([1, 4, 16]),
    kept=st.sampled_from(["none", "selective", "block"]),
    memory_gb=st.floats(8, 140),
    nodes=st.sampled_from([1, 2, 8]),
)
def test_the_smallest_change_fits(
    stage: int, rows: int, kept: str, memory_gb: float, nodes: int
) -> None:
    config = config_of(
        "reverse_7b",
        f"zero.stage={stage}",
        f"batch.micro_batch_rows={rows}",
        f"training.activation_checkpointing={kept}",
    )
    cluster = Cluster(nodes, 8, find_device("h100-80gb", memory_gb * 1e9))

    words = smallest_change(config, FACTS, cluster)

    if words is not None:
        assert fits(*(lambda c, on: (c, FACTS, on))(*changed(config, cluster, words)))


def test_offloading_moves_state_from_the_devices_to_their_host() -> None:
    kept = memory_of(config_of("reverse_7b"), FACTS, h100s(1))
    moved = memory_of(config_of("reverse_7b", "zero.offload=optimizer"), FACTS, h100s(1))

    assert moved.parts.total < kept.parts.total
    assert moved.host_bytes_per_node > kept.host_bytes_per_node + kept.parts.optimizer * 7


def test_days_are_flops_divided_by_the_devices_throughput() -> None:
    config = config_of()
    plan = plan_run(config, FACTS, h100s(8), 0.5)

    assert plan.duration is not None
    assert plan.duration.device_hours is not None
    seconds = plan.steps * plan.step_tokens * plan.flops_per_token / (989e12 * 0.5)  # type: ignore[operator]
    assert plan.duration.device_hours == pytest.approx(seconds / 3600)
    assert plan.duration.days == pytest.approx(seconds / 64 / 86_400)


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_one_rank_sends_nothing(stage: int) -> None:
    traffic = step_traffic(
        config_of().model,
        8_888,
        ranks=1,
        accumulation_steps=4,
        stage=stage,
        precision="bf16",
        optimizer="muon",
    )

    assert traffic.total == 0


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_traffic_of_gradients_by_precision_reduction_and_collective(stage: int) -> None:
    def gradient_bytes(*overrides: str) -> float:
        config = config_of("reverse_7b", f"zero.stage={stage}", *overrides)
        return plan_run(config, FACTS, h100s(1), 0.4).traffic.gradient_bytes

    low = gradient_bytes("zero.gradient_precision=bf16")
    accumulation = plan_run(config_of(), FACTS, h100s(1), 0.4).accumulation_steps
    assert accumulation > 1

    assert gradient_bytes("zero.gradient_precision=fp32") == pytest.approx(2 * low)
    once = gradient_bytes("zero.gradient_precision=bf16", "zero.reduce_once=true")
    assert once == pytest.approx(low / (1 if stage == 1 else accumulation))
    to_one = gradient_bytes("zero.gradient_precision=bf16", "zero.reduction=reduce")
    assert to_one == pytest.approx(low / (1 if stage == 3 else 2))


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_hierarchical_sharding_sends_less_between_nodes_for_more_memory(stage: int) -> None:
    flat = config_of("reverse_7b", f"zero.stage={stage}", "batch.micro_batch_rows=1")
    by_node = flat.model_copy(update={"zero": flat.zero.model_copy(update={"hierarchical": True})})
    before, after = (plan_run(one, FACTS, h100s(8), 0.4) for one in (flat, by_node))
    alone, on_one = (plan_run(one, FACTS, h100s(1), 0.4) for one in (flat, by_node))

    assert before.accumulation_steps > 1
    assert on_one == alone
    assert after.memory.parts.total > before.memory.parts.total
    inside, between = after.traffic.node, after.traffic.between_nodes
    assert between.total < before.traffic.total
    # A ring has all network cards of a node, so that fewer bytes in more steps may take longer.
    assert (after.traffic_s < before.traffic_s) == (stage > 1)
    assert inside is not None
    assert inside.total + between.total == pytest.approx(after.traffic.total)
    if stage < 3:  # the state and the traffic of one node
        assert after.memory.parts.optimizer == alone.memory.parts.optimizer
        assert inside.weight_bytes == alone.traffic.weight_bytes
        assert between.total == pytest.approx(2 * 2 * after.size.total / 8 * 7 / 8)
    else:
        assert after.memory.parts.optimizer == before.memory.parts.optimizer
        assert between.gradient_bytes == before.traffic.gradient_bytes


def test_hierarchical_sharding_is_given_up_before_the_micro_batch() -> None:
    config = config_of("reverse_7b", "zero.stage=2", "zero.hierarchical=true")
    cluster = h100s(8)
    memory = memory_of(config, FACTS, cluster).parts.total
    tight = Cluster(8, 8, find_device("h100-80gb", memory * 0.95))

    assert smallest_change(config, FACTS, tight) == "zero.hierarchical=false"


def test_a_single_reduction_is_given_up_first() -> None:
    config = config_of("reverse_7b", "zero.stage=2", "zero.reduce_once=true")
    cluster = h100s(1)
    memory = memory_of(config, FACTS, cluster).parts.total
    tight = Cluster(1, 8, find_device("h100-80gb", memory * 0.95))

    assert smallest_change(config, FACTS, tight) == "zero.reduce_once=false"


def test_checkpoints_kept_are_the_last_the_one_being_written_and_the_marked_ones() -> None:
    config = config_of("reverse_7b", "checkpoint.keep_every_steps=10000")

    plan = plan_run(config, FACTS, h100s(8), 0.4)

    assert plan.steps is not None
    assert plan.checkpoints_kept == 3 + 1 + plan.steps // 10_000


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        ("h100", {"h100-80gb", "h100-nvl-94gb", "h100-pcie-80gb"}),
        ("NVIDIA H100 80GB HBM3", {"h100-80gb", "h100-pcie-80gb"}),
        ("NVIDIA H100 PCIe", {"h100-pcie-80gb"}),
        ("nvidia_a100-sxm4-80gb", {"a100-80gb"}),
        ("a100", {"a100-80gb", "a100-40gb"}),
        ("tesla", set()),
    ],
)
def test_a_schedulers_name_matches_all_devices_that_it_may_mean(kind: str, names: set[str]) -> None:
    assert {device.name for device in devices_named_like(kind)} == names


def test_an_unknown_device_is_refused_with_the_closest_name() -> None:
    with pytest.raises(ConfigError, match=r"did you mean h100-80gb\?"):
        find_device("h100-80")


def test_facts_of_a_data_set_are_read_from_its_manifest(tiny_shards: Path) -> None:
    config = config_of("demo", f"data.shards={tiny_shards}", "batch.context_tokens=64")

    facts = run_facts(config, None, None)

    assert facts.total_tokens == 2000 * 8 * 64
    assert 1 < facts.attended_tokens < 64
    assert facts.shard_bytes == sum(path.stat().st_size for path in tiny_shards.glob("*.zst"))


def test_a_plan_has_the_steps_and_epochs_of_the_run(tiny_shards: Path) -> None:
    shards = [
        {"path": str(tiny_shards), "max_epochs": 0.2},
        {"path": str(tiny_shards), "weight": 3},
    ]
    overrides = (f"data.shards={json.dumps(shards)}", "batch.context_tokens=64")
    for length in (["training.steps=300"], ["training.steps=null", "training.epochs=1.5"]):
        config = config_of("demo", *overrides, *length)
        facts = run_facts(config, None, None)
        data = open_data(config, 0, 1)
        assert facts.data == data.mixed.uses
        assert any(note.startswith("documents of the 2 data sets have ") for note in facts.notes)
    assert data.rows_by_data_set(10**6, 8) == {str(tiny_shards): {"rows": 8}}


def test_rows_of_whole_documents_shorten_an_epoch_by_what_they_do_not_read(
    tiny_shards: Path,
) -> None:
    overrides = (f"data.shards={tiny_shards}", "batch.context_tokens=16", "training.steps=null")
    facts = [
        run_facts(
            config_of("demo", *overrides, "training.epochs=1", f"data.rows={rows}"), None, None
        )
        for rows in ("stream", "documents")
    ]
    stream, documents = (one.total_tokens for one in facts)
    assert stream is not None
    assert documents is not None
    assert documents < stream
    assert any("documents are longer than a row" in note for note in facts[1].notes)


def test_a_vocabulary_size_that_contradicts_the_shards_is_refused(tiny_shards: Path) -> None:
    config = config_of("demo", f"data.shards={tiny_shards}", "batch.context_tokens=64")

    with pytest.raises(ConfigError, match="`vocab_size` is 7"):
        run_facts(config, 7, None)


def test_on_a_cpu_the_copy_of_a_checkpoint_counts_as_the_ranks_memory() -> None:
    config = config_of("demo")

    memory = memory_of(config, FACTS, Cluster(1, 2, cpu_device(8e9, None)))

    assert memory.host_bytes_per_node == 0
    assert "saving" in memory.moments


def plan(run_megaback: RunMegaback, *arguments: str) -> subprocess.CompletedProcess[str]:
    return run_megaback("plan", CONFIGS / "reverse_7b.yaml", *arguments)


def test_the_command_prints_every_part_and_its_assumptions(run_megaback: RunMegaback) -> None:
    done = plan(
        run_megaback, "--nodes", "16", "--device-name", "h100-80gb", "--training-tokens", "1.1e11"
    )

    assert (done.returncode, done.stderr) == (0, "")
    starts = [line.split()[0] for line in done.stdout.splitlines() if not line.startswith(" ")]
    assert starts[:4] == ["model", "step", "run", "memory"]
    assert {"host", "network", "disk", "time", "note"} <= set(starts)
    assert "7,052,406,784 parameters" in done.stdout
    assert "of arithmetic," in done.stdout


def test_a_run_that_does_not_fit_has_its_own_exit_code_and_a_suggested_change(
    run_megaback: RunMegaback,
) -> None:
    done = plan(run_megaback, "--device-name", "a100-40gb", "--json")

    assert done.returncode == 14
    change = json.loads(done.stdout)["smallest_change"]
    assert change is not None
    assert f"the smallest change that fits is {change}" in done.stderr
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--device-name", "h101"), 10, "unknown device 'h101'"),
        ((), 10, "give --device-name"),
        (("--device-name", "h100-80gb", "--nodes", "0"), 2, "0 is not in the range"),
        (("--device-name", "h100-80gb", "--nodes", "3"), 11, "not divisible by 24 ranks"),
        (("--device-name", "v100-32gb"), 10, "does not compute in bf16"),
        (("--device-name", "h100-80gb", "modle.width=8"), 10, "did you mean model?"),
        (("--device-name", "h100-80gb", "--mfu", "2"), 2, "2.0 is not in the range"),
    ],
)
def test_an_invalid_plan_is_reported_without_a_traceback(
    arguments: tuple[str, ...], code: int, message: str, run_megaback: RunMegaback
) -> None:
    done = plan(run_megaback, *arguments)

    assert done.returncode == code
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr


def test_the_plan_can_be_printed_as_json(run_megaback: RunMegaback) -> None:
    done = plan(run_megaback, "--nodes", "16", "--device-name", "h100-80gb", "--json")

    fields: dict[str, Any] = json.loads(done.stdout)
    assert fields["fits"] is True
    assert set(fields["stages"]) == {"0", "1", "2", "3"}
    assert fields["steps"] is None
    assert fields["stages"]["2"]["total_bytes"] == pytest.approx(
        sum(fields["stages"]["2"]["parts"].values())
    )


def test_every_device_has_memory_and_peak_flops() -> None:
    assert all(
        device.memory_bytes > 1e9 and device.peak_flops("fp32") for device in DEVICES.values()
    )
