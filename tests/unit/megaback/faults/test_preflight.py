"""The node that differs from the others is named, and no other."""

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.faults.node_facts import RankFacts, code_hash, versions
from megaback.faults.preflight import Finding, compare_disks, compare_ranks, find_broken_links
from megaback.faults.shared_disk import DiskFacts

VERSIONS = {"torch": "2.13.0", "code": "abc"}


def fleet(num_nodes: int, ranks_per_node: int = 2) -> list[RankFacts]:
    """Equal ranks on equal nodes."""
    return [
        RankFacts(
            rank=rank,
            node=f"n{rank // ranks_per_node}",
            device="H100",
            num_devices=2,
            memory_free_bytes=80 * 10**9,
            multiply_flops=5e14,
            versions=VERSIONS,
        )
        for rank in range(num_nodes * ranks_per_node)
    ]


def with_node(facts: Sequence[RankFacts], node: str, **fields: object) -> list[RankFacts]:
    return [replace(one, **fields) if one.node == node else one for one in facts]  # type: ignore[arg-type]


def named(findings: Sequence[Finding]) -> set[tuple[str, str, bool]]:
    return {(item.check, item.node, item.stops) for item in findings}


@given(st.integers(1, 6), st.integers(1, 8), st.sampled_from(["cuda", "cpu"]))
def test_equal_nodes_have_no_problems(num_nodes: int, ranks_per_node: int, device: str) -> None:
    assert compare_ranks(fleet(num_nodes, ranks_per_node), device, 10) == []


@pytest.mark.parametrize(
    ("fields", "check", "stops", "says"),
    [
        ({"versions": VERSIONS | {"torch": "2.9"}}, "versions", True, "has torch 2.9, but"),
        ({"versions": VERSIONS | {"code": "def"}}, "versions", True, "has code def, but"),
        ({"problem": "cannot multiply: ECC"}, "device", True, "its device cannot multiply: ECC"),
        ({"device": "A100"}, "device", False, "has the device A100, but the other nodes have H100"),
        ({"num_devices": 1}, "device", False, "has 1 GPUs, but the other nodes have 2"),
        ({"multiply_flops": 3e14}, "speed", False, "multiplies at 300,000.0 GFLOP/s, the median"),
        ({"memory_free_bytes": 10**9}, "memory", False, "has 1.0 GB of memory free, the median"),
        ({"clock_offset_s": -42.0}, "clock", False, "is 42.0 s behind the others'"),
    ],
)
@given(st.integers(3, 6), st.data())
def test_the_node_that_is_different_is_named(
    fields: dict[str, object],
    check: str,
    stops: bool,
    says: str,
    num_nodes: int,
    data: st.DataObject,
) -> None:
    bad = f"n{data.draw(st.integers(0, num_nodes - 1))}"
    findings = compare_ranks(with_node(fleet(num_nodes), bad, **fields), "cuda", 10)

    assert named(findings) == {(check, bad, stops)}
    assert all(bad in item.message and says in item.message for item in findings)


def test_a_slow_node_is_named_on_gpus_and_accepted_on_cpus() -> None:
    slower = with_node(fleet(4), "n1", multiply_flops=3e14)

    assert compare_ranks(slower, "cpu", 10) == []
    assert named(compare_ranks(slower, "cuda", 10)) == {("speed", "n1", False)}


def test_ranks_that_share_a_gpu_are_named() -> None:
    ids = ["GPU-a", "GPU-b", "GPU-a", "GPU-a"]  # another node may reuse an id
    facts = [replace(one, device_id=ids[one.rank]) for one in fleet(2)]

    (finding,) = compare_ranks(facts, "cuda", 10)

    assert finding.stops
    assert finding.message.startswith("node n1 (rank 3) has the GPU of rank 2, GPU-a")


def test_both_ends_of_a_broken_link_are_named() -> None:
    findings = find_broken_links(fleet(4), [3, 4])

    assert named(findings) == {("link", "n1", True), ("link", "n2", True)}
    assert findings[0].message.startswith("node n1 (rank 3) could not exchange data with its neigh")


def test_low_memory_is_reported_once_per_host_but_for_each_gpu() -> None:
    poor = with_node(fleet(4), "n2", memory_free_bytes=10**9)

    assert len(compare_ranks(poor, "cpu", 10)) == 1
    assert len(compare_ranks(poor, "cuda", 10)) == 2


@given(st.floats(-100, 100), st.floats(1, 100))
def test_a_clock_may_differ_by_as_much_as_heartbeats_allow(offset_s: float, max_s: float) -> None:
    findings = compare_ranks(with_node(fleet(3), "n1", clock_offset_s=offset_s), "cuda", max_s)

    assert bool(findings) == (math.fabs(offset_s) > max_s)


def test_with_two_nodes_the_versions_of_the_first_count() -> None:
    both = with_node(fleet(2), "n0", versions=VERSIONS | {"torch": "2.9"})

    assert {item.node for item in compare_ranks(both, "cuda", 10)} == {"n1"}


A, B, C = (DiskFacts(node, 1.0, 1.0) for node in "abc")
UNREAD = "cannot read"


@pytest.mark.parametrize(
    ("disks", "bad"),
    [
        ([A], []),
        ([A, B, C], []),
        ([A, replace(B, unread=UNREAD), C], ["b"]),
        ([replace(A, unread=UNREAD), replace(B, unread=UNREAD), C], ["b"]),
        ([replace(A, unread=UNREAD), replace(B, unread=UNREAD)], ["b"]),
        ([replace(A, unread=UNREAD), replace(B, unread=UNREAD), replace(C, unread=UNREAD)], ["a"]),
        ([replace(A, unread=UNREAD), B], ["a"]),
        ([A, B, replace(C, problem="disk full")], ["c"]),
    ],
)
def test_the_node_with_another_disk_is_named(disks: list[DiskFacts], bad: list[str]) -> None:
    findings = compare_disks(disks)

    assert [item.node for item in findings] == bad
    assert all(item.stops for item in findings)


def test_versions_cover_the_libraries_and_our_own_code() -> None:
    found = versions()

    assert {"python", "torch", "deepspeed", "megaback", "flash-attn", "code"} <= set(found)
    assert found == versions()


def test_a_change_in_any_module_of_any_folder_changes_the_hash_of_the_code(tmp_path: Path) -> None:
    names = ["megaback/a.py", "megaback/deep/er/a.py", "data_pipeline/a.py", "data_pipeline/b/c.py"]
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    hashes = {code_hash(tmp_path)}
    for name in names:
        (tmp_path / name).write_text("x = 2\n")
        hashes.add(code_hash(tmp_path))
    (tmp_path / "megaback/deep/er/a.py").rename(tmp_path / "megaback/deep/a.py")
    hashes.add(code_hash(tmp_path))
    assert len(hashes) == len(names) + 2
