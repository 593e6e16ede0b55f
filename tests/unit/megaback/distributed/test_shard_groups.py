"""Nodes whose ranks can shard among themselves, and the buckets of their averages."""

import pytest
import torch

from data_pipeline.errors import LaunchError
from megaback.distributed.shard_groups import _buckets, _require_equal


def test_equal_nodes_of_consecutive_ranks_are_accepted() -> None:
    _require_equal([("a", 2), ("a", 2), ("b", 2), ("b", 2)])
    _require_equal([("a", 1), ("b", 1)])
    _require_equal([("container", 2)] * 4)


@pytest.mark.parametrize(
    ("nodes", "message"),
    [
        ([("a", 2), ("a", 2), ("b", 1)], "a has 2 but b 1; start as many on each"),
        ([("a", 2), ("b", 2), ("a", 2), ("b", 2)], "ranks from 0 on are on a, b; .*=block"),
        ([("a", 2), ("a", 2), ("a", 2)], "LOCAL_SIZE says 2 on a, and 3 of the run's 3 are there"),
        (
            [("a", 4), ("a", 4), ("b", 4), ("b", 4)],
            "LOCAL_SIZE says 4 on a, and 2 of the run's 4 are there; set LOCAL_SIZE to that",
        ),
        ([("a", 2), ("a", 2), ("b", 3), ("b", 3)], "LOCAL_SIZE says 3 on b, and 2 of the"),
    ],
)
def test_other_nodes_are_refused(nodes: list[tuple[str, int]], message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        _require_equal(nodes)


def test_buckets_join_small_tensors_and_split_large_ones_in_place() -> None:
    parts = [torch.zeros(2, 2), torch.zeros(3), torch.zeros(13)]
    lengths = []
    for bucket in _buckets(parts, 8):
        lengths.append([len(piece) for piece in bucket])
        for piece in bucket:
            piece.add_(1)

    assert lengths == [[4, 3], [8], [5]]
    assert all(bool((part == 1).all()) for part in parts)
