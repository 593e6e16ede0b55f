"""Passages, damage and AUC of `benchmarks/selection.py`."""

import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.controlled.damage import Damage, damaged, mixture, passages
from benchmarks.controlled.ranking import auc, auc_interval

VALUES = st.lists(st.integers(0, 6), min_size=1, max_size=12)
SENTENCES = [f"Sentence {number} has words." for number in range(9)]


@given(VALUES, VALUES)
def test_auc_is_the_share_of_pairs_in_order(good: list[int], bad: list[int]) -> None:
    pairs = [(one > other) + 0.5 * (one == other) for one in good for other in bad]
    assert auc(good, bad) == pytest.approx(sum(pairs) / len(pairs))
    assert auc(bad, good) == pytest.approx(1 - auc(good, bad))


def test_an_interval_contains_the_auc_and_narrows_with_more_documents() -> None:
    generator = random.Random(0)
    good = [generator.gauss(1, 1) for _ in range(400)]
    bad = [generator.gauss(0, 1) for _ in range(400)]

    few, many = auc_interval(good[:40], bad[:40]), auc_interval(good, bad)

    for one in (few, many):
        assert one.low is not None
        assert one.high is not None
        # For two normal distributions a standard deviation apart, it is 0.760.
        assert one.low < 0.760 < one.high
    assert many.high - many.low < few.high - few.low  # type: ignore[operator]


def test_passages_have_whole_sentences_and_no_ends_of_lines() -> None:
    text = "\n".join(SENTENCES) + " A last one"
    (first, second) = passages(text * 2, 160, 2)
    assert first == SENTENCES[:8]
    assert second[0] == SENTENCES[8]
    assert not list(passages("Too few. Sentences " + "long " * 200 + ".", 100, 2))


@pytest.mark.parametrize("kind", Damage)
def test_damage_keeps_every_sentence(kind: Damage) -> None:
    changed = damaged(SENTENCES, kind, random.Random(1))

    assert changed != SENTENCES
    for sentence in SENTENCES:
        assert sum(sentence in one for one in changed) == 1
    if kind is Damage.SHUFFLED:
        assert sorted(changed) == SENTENCES
    if kind is Damage.BOILERPLATE:
        assert [one for one in changed if one in SENTENCES] == SENTENCES


def test_a_third_of_a_mixture_is_damaged_with_equal_shares() -> None:
    found = mixture([SENTENCES] * 90, random.Random(2))

    assert Counter(kind for _, kind in found) == {None: 60, **dict.fromkeys(Damage, 10)}
    assert all((text == " ".join(SENTENCES)) == (kind is None) for text, kind in found)
