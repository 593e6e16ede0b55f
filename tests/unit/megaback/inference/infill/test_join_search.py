"""Joins of two halves: the text between, and its estimated scores."""

import random
from collections.abc import Callable, Sequence
from itertools import product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import PromptError
from data_pipeline.text.codec import Direction, TextCodec
from megaback.inference.infill.join_scores import Half, JoinScores, score_half_steps
from megaback.inference.infill.join_search import Join, best_join_steps, mean_per_token
from megaback.inference.infill.prompts import InfillPrompts
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.inference.steps import finish
from megaback.model.gpt import ReverseGPT
from tests.helpers.small_models import VOCAB_SIZE, make_model

Codecs = Callable[..., TextCodec]

IDS = st.lists(st.integers(1, VOCAB_SIZE - 1), min_size=1, max_size=5).map(tuple)
HALVES = st.lists(IDS, max_size=4).map(
    lambda some: [Half((1,), is_given=True), *(Half((2, *ids)) for ids in some)]
)
TEXT = st.text(st.characters(), min_size=1, max_size=12) | st.sampled_from(
    ["<|im_end|>", "the old", " captain ", "a\u2581b", "\ud800", "é\U0001f600", "  \n"]
)
PROMPT, OTHER_PROMPT = (0, 5, 6), (0, 7, 8, 9)
WEIGHT = 0.3


def gap_between(codec: Codecs, beginning: str, ending: str) -> InfillPrompts:
    return InfillPrompts.between(
        codec(Direction.FORWARD), codec(Direction.BACKWARD), beginning, ending
    )


@given(texts=st.tuples(TEXT, TEXT, TEXT, TEXT))
def test_the_middle_is_exactly_the_text_of_both_halves(
    codec: Codecs, texts: tuple[str, str, str, str]
) -> None:
    beginning, left, right, ending = texts
    gap = gap_between(codec, beginning, ending)
    onwards = [gap.before_held, *codec(Direction.FORWARD).encode(left).tolist()]
    backwards = [gap.after_held, *codec(Direction.BACKWARD).encode(right).tolist()]
    expected = None if "\ufffd" in left + right else left + right
    assert gap.middle(onwards, backwards) == expected


def test_a_text_cut_anywhere_is_restored_from_its_own_tokens(
    codec: Codecs, english_documents: Sequence[str]
) -> None:
    """Within words too, where the held-back token becomes part of a longer one."""
    generator = random.Random(1)
    grown = 0
    for text in english_documents[:100]:
        start, stop = sorted(generator.sample(range(1, len(text)), 2))
        gap = gap_between(codec, text[:start], text[stop:])
        whole = [gap.codec.begin_id, *gap.codec.encode(text).tolist()]
        backward = list(reversed(whole[1:]))
        ahead, back = len(gap.before), len(gap.after) - 1
        if (*gap.before, *gap.after[:0:-1]) != (*whole[:ahead], *whole[len(whole) - back :]):
            continue  # a token spans an edge into a given text
        grown += whole[ahead] != gap.before_held
        for cut in range(ahead + 1, len(whole) - back):
            onwards = whole[ahead:cut]
            assert gap.middle(onwards, backward[back : len(backward) - cut + 1]) == text[start:stop]
    assert grown > 20


def test_a_join_within_a_character_or_with_an_empty_text_is_no_middle(
    codec: Codecs,
) -> None:
    gap = gap_between(codec, "the", "map")
    first, *_ = gap.codec.encode("\U0001f600").tolist()
    assert gap.middle([gap.before_held, first], [gap.after_held]) is None
    assert gap.middle([gap.before_held], [gap.after_held]) is None


@pytest.mark.parametrize(
    ("beginning", "ending", "name"), [("", "a", "beginning"), ("a", "", "ending")]
)
def test_a_gap_needs_both_texts(codec: Codecs, beginning: str, ending: str, name: str) -> None:
    with pytest.raises(PromptError, match=f"the {name} is empty"):
        gap_between(codec, beginning, ending)


def forgetful(seed: int) -> ReverseGPT:
    """A model that sees only the last id, so that estimates are exact."""
    model = make_model(seed)
    with torch.no_grad():
        for block in model.model.layers:
            block.self_attn.o_proj.weight.zero_()
    return model


FORWARD, BACKWARD = forgetful(1), forgetful(2)


def score_halves(
    model: ReverseGPT,
    prompt: Sequence[int],
    halves: Sequence[Half],
    other_prompt: Sequence[int],
    others: Sequence[Half],
) -> JoinScores:
    return finish(score_half_steps(model, prompt, halves, other_prompt, others))


def estimated(
    halves: Sequence[Half], others: Sequence[Half], minimum: int = 1, maximum: int = 99
) -> list[Join]:
    return finish(
        best_join_steps(
            halves,
            others,
            score_halves(FORWARD, PROMPT, halves, OTHER_PROMPT, others),
            score_halves(BACKWARD, OTHER_PROMPT, others, PROMPT, halves),
            min_tokens=minimum,
            max_tokens=maximum,
            forward_weight=WEIGHT,
        )
    )


@settings(max_examples=40)
@given(halves=HALVES, others=HALVES)
def test_estimates_are_exact_for_models_that_see_one_id(
    halves: list[Half], others: list[Half]
) -> None:
    joins = estimated(halves, others)
    onwards, backwards = [], []
    for join in joins:
        ahead = halves[join.forward].ids[: join.forward_cut]
        back = others[join.backward].ids[: join.backward_cut]
        onwards.append(Continuation(PROMPT, [*ahead, *reversed(back), *OTHER_PROMPT[:0:-1]]))
        backwards.append(Continuation(OTHER_PROMPT, [*back, *reversed(ahead), *PROMPT[:0:-1]]))
    pairs = zip(onwards, backwards, strict=True)
    lengths = [(len(one.written), len(other.written)) for one, other in pairs]
    forward = log_probabilities(FORWARD, onwards)
    backward = log_probabilities(BACKWARD, backwards)
    for join, nats, other_nats, num_tokens in zip(joins, forward, backward, lengths, strict=True):
        expected = mean_per_token(nats, other_nats, *num_tokens, WEIGHT)
        assert join.estimate == pytest.approx(float(expected), abs=1e-4)


def estimate_of(own: JoinScores, at: tuple[int, int, int, int]) -> float:
    """log P of one join by one model, from its tables."""
    half, cut, other, other_cut = at
    column = own.column_JB[other, other_cut - 1]
    nats = own.own_IA[half, cut - 1] + own.next_IAC[half, cut - 1, column]
    return float(nats + own.rest_JB[other, other_cut - 1])


@settings(max_examples=40)
@given(halves=HALVES, others=HALVES, minimum=st.integers(1, 4), extent=st.integers(0, 4))
def test_joins_are_the_best_of_allowed_length_per_pair_in_order(
    halves: list[Half], others: list[Half], minimum: int, extent: int
) -> None:
    forward = score_halves(FORWARD, PROMPT, halves, OTHER_PROMPT, others)
    backward = score_halves(BACKWARD, OTHER_PROMPT, others, PROMPT, halves)
    expected = []
    for i, half in enumerate(halves):
        for j, other in enumerate(others):
            of_pair = []
            for a, b in product(range(1, len(half.ids) + 1), range(1, len(other.ids) + 1)):
                if minimum <= half.new_tokens(a) + other.new_tokens(b) <= minimum + extent:
                    ahead = estimate_of(forward, (i, a, j, b))
                    back = estimate_of(backward, (j, b, i, a))
                    tokens = a + b + len(OTHER_PROMPT) - 1, a + b + len(PROMPT) - 1
                    of_pair.append(float(mean_per_token(ahead, back, *tokens, WEIGHT)))
            expected += sorted(of_pair, reverse=True)[:4]

    found = [join.estimate for join in estimated(halves, others, minimum, minimum + extent)]

    assert found == pytest.approx(sorted(expected, reverse=True))


def test_a_whole_half_joined_to_the_given_text_is_scored_exactly_by_the_other_model() -> None:
    model = make_model(3)
    half = Half((11, 12, 13, 14))
    tables: JoinScores = score_halves(
        model, PROMPT, [Half((1,), is_given=True)], OTHER_PROMPT, [Half((2,), is_given=True), half]
    )
    written = [1, *reversed(half.ids), *reversed(OTHER_PROMPT[1:])]
    (expected,) = log_probabilities(model, [Continuation(PROMPT, written)])
    assert tables.of_own(0)[0, 1, 3] == pytest.approx(expected, abs=1e-4)
