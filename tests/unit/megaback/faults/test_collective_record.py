"""Records of collectives name the one in which a run hangs, and the ranks that have not entered."""

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from megaback.faults.collective_record import (
    Collective,
    CollectiveRecord,
    describe_hang,
    read_collectives,
    record_of,
    write_collectives,
)

START = "0" * 12
GRADIENTS = Collective("0 (default_pg)", 7, "gloo:all_reduce of Float 128", 90.0)
CONTROL = Collective("1 (control messages)", 3, "gloo:all_reduce of Double 2", 95.0)


def record(rank: int, last: int, *waiting: Collective, size: int = 2) -> CollectiveRecord:
    return CollectiveRecord(
        rank=rank,
        world_size=size,
        start=START,
        time=100.0,
        place="in sleep of a/b/c.py:1",
        entered={GRADIENTS.group: last, CONTROL.group: 2 + (CONTROL in waiting)},
        waiting=waiting,
        groups={},
    )


def entry(**values: Any) -> dict[str, Any]:
    """An entry of torch's flight recorder, as of 2.13."""
    usual = {
        "process_group": ["0", "default_pg"],
        "collective_seq_id": 7,
        "is_p2p": False,
        "retired": False,
        "state": "scheduled",
        "profiling_name": "nccl:all_reduce",
        "input_sizes": [[8, 16]],
        "input_dtypes": ["BFloat16"],
        "time_created_ns": 90_000_000_000,
    }
    return usual | values


def made_of(*entries: dict[str, Any]) -> CollectiveRecord:
    facts = {"rank": 0, "world_size": 2, "start": START, "time": 100.0, "place": ""}
    return record_of(entries, {}, **facts)


def test_a_record_has_the_last_collectives_and_those_under_way() -> None:
    done = entry(collective_seq_id=6, retired=True)
    other = entry(process_group=["3", "undefined"], collective_seq_id=2, state="completed")
    sent = entry(is_p2p=True, collective_seq_id=99)

    made = made_of(done, other, sent, entry())

    assert made.entered == {"0 (default_pg)": 7, "3": 2}
    assert made.waiting == (
        Collective("0 (default_pg)", 7, "nccl:all_reduce of BFloat16 8x16", 90),
    )


@pytest.mark.parametrize(
    ("sizes", "text"),
    [([], "nothing"), ([[]], "Float 1"), ([[2]] * 5, "Float 2, Float 2 and 3 more")],
)
def test_sizes_are_named_briefly(sizes: list[list[int]], text: str) -> None:
    made = made_of(entry(input_sizes=sizes, input_dtypes=["Float"] * len(sizes)))

    assert made.waiting[0].operation == f"nccl:all_reduce of {text}"


def test_the_rank_that_has_not_entered_is_named_with_its_place() -> None:
    said = describe_hang([record(0, 7, GRADIENTS), record(1, 6)])

    assert said == (
        "rank 0 waited in gloo:all_reduce of Float 128 (number 7 of group 0 (default_pg)) for 10 s,"
        " which rank 1 has not entered (in sleep of a/b/c.py:1)"
    )


def test_a_rank_without_a_record_is_named() -> None:
    said = describe_hang([record(0, 7, GRADIENTS)])

    assert said is not None
    assert said.endswith("for 10 s; rank 1 left no record")


def test_the_collective_that_all_have_entered_is_named_only_without_another() -> None:
    both = [record(0, 7, GRADIENTS, CONTROL), record(1, 7, GRADIENTS)]

    assert "Double 2" in (describe_hang(both) or "")
    everywhere = [record(0, 7, GRADIENTS), record(1, 7, GRADIENTS)]
    assert (describe_hang(everywhere) or "").startswith("ranks 0, 1 waited in ")
    assert (describe_hang(everywhere) or "").endswith("which all ranks have entered")


def test_of_many_ranks_a_few_are_named() -> None:
    records = [record(rank, 7 - (rank > 9), size=16) for rank in range(16)]
    records[3] = record(3, 7, GRADIENTS, size=16)

    said = describe_hang(records) or ""

    assert said.startswith("rank 3 waited")
    assert "ranks 10, 11, 12, 13 and 2 more have not entered" in said


def test_ranks_outside_of_a_group_are_not_missing() -> None:
    groups: dict[str, tuple[int, ...]] = {GRADIENTS.group: (0, 2)}
    records = [
        replace(record(0, 7, GRADIENTS, size=3), groups=groups),
        record(1, 0, size=3),
        record(2, 6, size=3),
    ]

    assert ", which rank 2 has not entered" in (describe_hang(records) or "")


@pytest.mark.parametrize("records", [[], [record(0, 7), record(1, 7)]])
def test_without_a_wait_nothing_is_named(records: Sequence[CollectiveRecord]) -> None:
    assert describe_hang(records) is None


def test_records_of_the_start_are_read_back(tmp_path: Path) -> None:
    mine = record(0, 7, GRADIENTS)
    write_collectives(tmp_path, mine, [entry()])
    write_collectives(tmp_path, replace(record(1, 6), start="1" * 12), [])

    assert read_collectives(tmp_path, START) == [mine]
    assert read_collectives(tmp_path, None) == []
    text = (tmp_path / "collectives" / "rank-00000.jsonl").read_text()
    assert json.loads(text.splitlines()[1]) == [entry()]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"rank": 0}',
        "x" * (2 << 20),
        json.dumps({"rank": 5, "world_size": 2}),
    ],
)
def test_damaged_records_are_skipped(tmp_path: Path, text: str) -> None:
    (tmp_path / "collectives").mkdir()
    (tmp_path / "collectives" / "rank-00000.jsonl").write_text(text)

    assert read_collectives(tmp_path, None) == []
