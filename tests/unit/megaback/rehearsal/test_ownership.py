"""Ownership of parameters: every element by one rank."""

from types import SimpleNamespace

import torch
from hypothesis import given
from hypothesis import strategies as st

from megaback.checkpoints.state import Partition
from megaback.optim.zero_matrices import Slice, slices_of_each
from megaback.rehearsal.ownership import ownership_of, uncovered


def problems(slices: list[list[Slice]], lengths: dict[str, int]) -> list[str]:
    part = Partition(torch.empty(0), False, tuple(lengths), slices)
    return list(uncovered([part], lengths))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=5), st.integers(1, 9))
def test_partitions_of_each_parameter_are_complete(sizes: list[int], ranks: int) -> None:
    partitions = [-(-size // ranks) for size in sizes]
    lengths = {f"weight{number}": size for number, size in enumerate(sizes)}
    assert problems(slices_of_each(partitions, sizes, ranks), lengths) == []


def test_gaps_overlaps_and_missing_ends_are_found() -> None:
    first, second = Slice(0, 0, 4), Slice(0, 4, 4)
    assert problems([[first], [second]], {"w": 8}) == []
    assert problems([[first], [Slice(0, 5, 3)]], {"w": 8}) == ["w: elements 4 to 5"]
    assert problems([[first], [Slice(0, 3, 5)]], {"w": 8}) == ["w: elements 3 to 4"]
    assert problems([[first], [second]], {"w": 9}) == ["w: 8 of 9 elements are owned"]


def test_a_parameter_without_a_group_is_found() -> None:
    part = Partition(torch.empty(0), False, ("w",), [[Slice(0, 0, 8)]])
    assert len(list(uncovered([part], {"w": 8, "other": 1}))) == 1


def test_frozen_weights_are_owned_by_no_rank() -> None:
    module = torch.nn.Linear(3, 2)
    module.bias.requires_grad_(False)
    engine = SimpleNamespace(
        shards=SimpleNamespace(size=4), module=module, zero_optimization_stage=lambda: 0
    )

    found = ownership_of(engine)

    assert (found.parameters, found.max_weights) == (6, 6)
