"""Messages between ranks round-trip, and invalid ones are refused."""

import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import LaunchError
from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.distributed import world as distributed
from megaback.distributed.messages import decode, encode
from megaback.distributed.world import World
from megaback.faults.node_facts import RankFacts
from megaback.faults.shared_disk import DiskFacts
from megaback.training.start import AlreadyTrained

_TEXTS = st.text(st.characters(exclude_categories=["Cs"]))
_PATHS = st.builds(Path, _TEXTS.filter(lambda text: "\0" not in text))
_KINDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (int, st.integers(-(1 << 70), 1 << 70)),
    (float, st.floats()),
    (str, _TEXTS),
    (bool, st.booleans()),
    (str | None, st.none() | _TEXTS),
    (list[Path], st.lists(_PATHS)),
    (list[tuple[int, float | None]], st.lists(st.tuples(st.integers(), st.none() | st.floats()))),
    (dict[str, tuple[int, str]], st.dictionaries(_TEXTS, st.tuples(st.integers(), _TEXTS))),
    (RankFacts, st.builds(RankFacts, node=_TEXTS, device=_TEXTS)),
    (DiskFacts | None, st.none() | st.builds(DiskFacts, node=_TEXTS)),
    (AlreadyTrained | None, st.none() | st.builds(AlreadyTrained)),
    (
        CheckpointMeta | None,
        st.none() | st.builds(CheckpointMeta, config=st.dictionaries(_TEXTS, st.integers())),
    ),
]


@dataclass(frozen=True)
class Fact:
    """Something to send."""

    value: int


@given(st.data())
def test_a_value_round_trips(data: st.DataObject) -> None:
    kind, values = data.draw(st.sampled_from(_KINDS))
    value = data.draw(values)
    # Compared by repr, in which NaN equals NaN, and a tuple differs from a list.
    assert repr(decode(encode(value, kind), kind, 0)) == repr(value)


def test_a_file_name_that_is_not_utf_8_is_sent_with_replacement_characters() -> None:
    assert decode(encode("cannot read \udcff", str), str, 0) == "cannot read ?"


@given(st.binary() | st.builds(pickle.dumps, st.integers()))
def test_an_invalid_message_is_refused_with_its_sender(message: bytes) -> None:
    with pytest.raises(LaunchError, match="rank 3 sent"):
        decode(message, Fact, 3)


@pytest.mark.parametrize("message", [b'{"value": "7"}', b'{"value": 7.0}', b"{}", b"[7]", b"null"])
def test_a_value_of_another_type_is_refused(message: bytes) -> None:
    with pytest.raises(LaunchError):
        decode(message, Fact, 0)


def test_gathered_and_broadcast_values_equal_those_sent(world: World) -> None:
    assert world.gather(Fact(7), Fact) == [Fact(7)]
    assert world.of_first([Path("a")], list[Path]) == [Path("a")]
    assert world.gather("", str) == [""]


def test_no_memory_is_allocated_for_an_oversized_message(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(LaunchError, match="above the limit of 1,048,576"):
        world.gather("x" * (1 << 20), str)
    announced = World(1, 2, torch.device("cpu"), None)
    monkeypatch.setattr(
        distributed.dist, "broadcast", lambda tensor, **_: tensor.fill_((1 << 63) - 1)
    )
    with pytest.raises(LaunchError, match="announces a message of 9,223,372,036,854,775,807"):
        announced.of_first(None, str)
