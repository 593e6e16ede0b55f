"""Untrusted JSON: bounded memory and checked types."""

import json
import time
import tracemalloc
from contextlib import suppress
from dataclasses import asdict, dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common import checked_json
from data_pipeline.common.checked_json import checked, made_from, parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=8,
)


@dataclass(frozen=True)
class Inner:
    name: str


@dataclass(frozen=True)
class Outer:
    count: int
    share: float
    is_on: bool = False
    maybe: int | None = None
    pair: tuple[int, str] = (1, "a")
    inners: tuple[Inner, ...] = ()
    counts: dict[str, int] | None = None


def test_a_dataclass_is_made_from_an_object() -> None:
    fields = {
        "count": 3,
        "share": 1,
        "maybe": None,
        "pair": [4, "b"],
        "inners": [{"name": "x"}],
        "counts": {"a": 1},
    }
    assert made_from(Outer, fields) == Outer(
        3, 1, maybe=None, pair=(4, "b"), inners=(Inner("x"),), counts={"a": 1}
    )


@pytest.mark.parametrize(
    "changed",
    [
        {"count": True},
        {"count": 1.0},
        {"count": "1"},
        {"count": None},
        {"share": "0.5"},
        {"share": False},
        {"share": 10**400},
        {"is_on": 1},
        {"maybe": []},
        {"pair": [1]},
        {"pair": [1, 2]},
        {"pair": {"1": "a"}},
        {"inners": [{"name": 1}]},
        {"inners": [{}]},
        {"inners": [[]]},
        {"counts": {"a": "1"}},
        {"other": 1},
    ],
)
def test_values_of_other_types_and_names_are_refused(changed: dict[str, object]) -> None:
    with pytest.raises((ValueError, TypeError)):
        made_from(Outer, {"count": 1, "share": 0.5, **changed})


@given(VALUES)
def test_any_value_is_accepted_or_refused(value: object) -> None:
    for kind in (Outer, Inner):
        with suppress(ValueError, TypeError):
            made = json.loads(json.dumps(asdict(made_from(kind, value))))
            assert {name: made[name] for name in value} == value


def test_long_values_are_abbreviated_in_messages() -> None:
    with pytest.raises(ValueError, match=r"^tokens is \[\[") as caught:
        checked("tokens", [["deep"] * 1000] * 1000, int)
    assert len(str(caught.value)) < 200


BOMBS = {
    "lists": b"[" + b"[]," * 5_000_000 + b"[]]",
    "objects": b"[" + b'{"a":0},' * 3_000_000 + b"0]",
    "numbers": b"[" + b"-9," * 20_000_000 + b"0]",
    "nesting": b"[" * 2_000_000,
    "digits": b"[" + b"9" * 5_000_000 + b"]",
    "bytes": b"\xff" * 1000,
    "half": b'{"a": [1, 2',
    "infinity": b"[1e999]",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_are_refused_immediately(bomb: str) -> None:
    tracemalloc.start()
    started = time.process_time()
    with pytest.raises(ValueError, match=r".") as caught:
        parse_json(BOMBS[bomb])
    took_s = time.process_time() - started
    _, peak_bytes = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert took_s < 1
    assert peak_bytes < 64 << 20
    assert len(str(caught.value)) < 200


def test_parsed_values_stay_within_the_memory_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kind of value exceeds the estimate."""
    monkeypatch.setattr(checked_json, "_MAX_PARSED_BYTES", 16 << 20)
    for item in ('{"a":0},', "[],", "{},", "-9,", '"\u0101",', "1.5,", "[0],", '{"a":{"b":1}},'):
        text = item.encode()
        estimate = 240 * (text.count(b"{") + text.count(b"[")) + 90 * text.count(b",")
        data = b"[" + text * ((16 << 20) // estimate - 4) + b"0]"
        tracemalloc.start()
        parse_json(data)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak_bytes < (16 << 20) + 3 * len(data), item
