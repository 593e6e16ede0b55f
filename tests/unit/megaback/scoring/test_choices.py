"""Scores of choices are the model's log-probabilities, on ids that occur in training."""

import random
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, PromptError
from data_pipeline.text.codec import Direction, TextCodec, Unit, reverse_words
from megaback.inference.device_pool import DevicePool
from megaback.inference.likelihood import Continuation
from megaback.model.attention import Segments
from megaback.model.gpt import ReverseGPT
from megaback.scoring.choices import (
    Choice,
    ChoiceEncoder,
    ChoiceScore,
    Scoring,
    pool_likelihoods,
    require_scoring,
    score_choices,
)
from tests.helpers.models import CONTEXT_TOKENS, random_model

Codecs = Callable[..., TextCodec]

CPU = torch.device("cpu")
WORDS = ["map", "road", "clock", "bottle", "the", "wall", "captain", "is", "of", "river"]
FORMATS = [
    (Direction.FORWARD, Unit.TOKEN),
    (Direction.BACKWARD, Unit.TOKEN),
    (Direction.BACKWARD, Unit.WORD),
]
SOME_TEXT = st.text(alphabet="ae tz.\n é", min_size=1, max_size=14)


@pytest.fixture(scope="module")
def model() -> ReverseGPT:
    return random_model()


def four_way_rows(count: int) -> list[list[Choice]]:
    generator = random.Random(5)

    def words(fewest: int, most: int) -> str:
        return " ".join(generator.choices(WORDS, k=generator.randint(fewest, most)))

    rows = []
    for _ in range(count):
        context = f"Question: {words(2, 7)}?\nAnswer:"
        rows.append([Choice(context, f" {words(1, 3)}") for _ in range(4)])
    return rows


@torch.inference_mode()
def log_probabilities(model: ReverseGPT, ids: list[int]) -> list[float]:
    """log P of each id after the first, in one pass of the whole model."""
    ids_T = torch.tensor(ids)
    segments = Segments.from_lengths((len(ids),), CPU)
    log_TV = model.logits(ids_T, torch.arange(len(ids)), segments).double().log_softmax(-1)
    return [float(log_TV[at - 1, ids[at]]) for at in range(1, len(ids))]


def scores_of(
    model: ReverseGPT, codec: TextCodec, choices: list[Choice], context_tokens: int = CONTEXT_TOKENS
) -> list[ChoiceScore]:
    encoded = ChoiceEncoder(codec, context_tokens).encode_all(choices)
    pool = DevicePool(Path(), [CPU], torch.float32, model)
    return score_choices(encoded, pool_likelihoods(pool), with_given=True, with_prior=True)


@pytest.mark.parametrize(("direction", "unit"), FORMATS)
def test_rows_equal_a_computation_by_hand(
    model: ReverseGPT, codec: Codecs, direction: Direction, unit: Unit
) -> None:
    codec = codec(direction, unit)
    count = 300 if (direction, unit) == (Direction.BACKWARD, Unit.TOKEN) else 20
    choices = [choice for row in four_way_rows(count) for choice in row]
    scores = scores_of(model, codec, choices)
    alone: dict[tuple[int, ...], float] = {}

    for choice, score in zip(choices, scores, strict=True):
        first = choice.continuation if direction is Direction.BACKWARD else choice.context
        if unit is Unit.WORD:
            first = first.lstrip()  # in reversed text, the space begins the next word's piece
        first_ids = codec.encode(first).tolist()
        whole = codec.encode(choice.context + choice.continuation).tolist()
        assert whole[: len(first_ids)] == first_ids
        second_ids = whole[len(first_ids) :]
        together = log_probabilities(model, [codec.begin_id, *whole])
        ids = (codec.begin_id, *second_ids)
        if ids not in alone:
            alone[ids] = sum(log_probabilities(model, [*ids]))
        conditional, of_first = sum(together[len(first_ids) :]), sum(together[: len(first_ids)])
        assert score.tokens == len(second_ids)
        for scoring, expected in {
            Scoring.QUESTION: conditional,
            Scoring.JOINT: conditional + of_first,
            Scoring.NORMALIZED: conditional / len(second_ids) + of_first,
            Scoring.RATIO: conditional - alone[ids],
        }.items():
            assert score.value(scoring) == pytest.approx(expected, abs=1e-5, rel=1e-6), scoring


def test_greedy_is_what_the_model_would_write(model: ReverseGPT, codec: Codecs) -> None:
    codec = codec(Direction.FORWARD)
    ids = [codec.begin_id, *codec.encode("the").tolist()]
    prompt = tuple(ids)
    for _ in range(3):
        ids_T = torch.tensor(ids)
        segments = Segments.from_lengths((len(ids),), CPU)
        logits_TV = model.logits(ids_T, torch.arange(len(ids)), segments)
        ids.append(int(logits_TV[-1].argmax()))
    new_ids = ids[len(prompt) :]
    written = [new_ids, [*new_ids[:-1], new_ids[-1] ^ 1]]
    pool = DevicePool(Path(), [CPU], torch.float32, model)
    found = pool_likelihoods(pool)([Continuation(prompt, tuple(one)) for one in written])

    assert [one.is_greedy for one in found] == [True, False]


@settings(max_examples=150)
@given(SOME_TEXT, SOME_TEXT, st.sampled_from([Unit.TOKEN, Unit.WORD]))
def test_a_backward_model_reads_a_training_document_divided_at_the_boundary(
    codec: Codecs, context: str, continuation: str, unit: Unit
) -> None:
    codec = codec(Direction.BACKWARD, unit)
    encoder = ChoiceEncoder(codec, 200)
    if not context.strip():
        with pytest.raises(PromptError, match="context is empty"):
            encoder.encode_all([Choice(context, continuation)])
        return
    (one,) = encoder.encode_all([Choice(context, continuation)])
    document = codec.encode_document(context + continuation).tolist()

    assert [*one.given, *one.scored] == document[:-1]
    given = context[len(context.rstrip()) :] + continuation
    if unit is Unit.TOKEN:
        assert given.endswith(codec.render(one.given))
        assert len(codec.render([*one.given, one.scored[0]])) > len(given)
    else:
        assert reverse_words(given).startswith(reverse_words(codec.render(one.given)))
    assert len(codec.render(one.scored)) >= len(context.rstrip())


def test_a_forward_model_has_the_tokens_of_lm_eval(codec: Codecs) -> None:
    codec = codec(Direction.FORWARD)
    (one,) = ChoiceEncoder(codec, 200).encode_all([Choice("the captain \n", "is of")])

    assert one.given == (codec.begin_id, *codec.encode("the captain").tolist())
    assert one.scored == tuple(codec.encode("the captain \nis of").tolist()[len(one.given) - 1 :])


def test_what_does_not_fit_is_cut_equally_for_all_continuations(codec: Codecs) -> None:
    context = "the captain is of the river and the road " * 6
    choices = [Choice(context, " the wall"), Choice(context, " the wall of the captain")]
    forward = ChoiceEncoder(codec(Direction.FORWARD), 40).encode_all(choices)
    backward = ChoiceEncoder(codec(), 40).encode_all(choices)
    whole = ChoiceEncoder(codec(), 4000).encode_all(choices)

    for one in (*forward, *backward):
        assert one.num_tokens <= 40
        assert one.num_cut > 0
    for one, complete in zip(backward, whole, strict=True):
        assert one.given == complete.given
        assert one.scored == complete.scored[: len(one.scored)]
    assert len({one.scored for one in backward}) == 1
    assert max(one.num_tokens for one in backward) == 40
    assert all(one.num_tokens == 40 for one in forward)


@pytest.mark.parametrize(
    ("direction", "choice", "match"),
    [
        (Direction.FORWARD, Choice("a", " wall" * 60), "does not fit"),
        (Direction.BACKWARD, Choice("a", " wall" * 60), "does not fit"),
        (Direction.FORWARD, Choice("the wall", ""), "adds no token"),
        (Direction.BACKWARD, Choice("", " wall"), "context is empty"),
    ],
)
def test_a_choice_without_a_score_is_refused(
    codec: Codecs, direction: Direction, choice: Choice, match: str
) -> None:
    with pytest.raises(PromptError, match=match):
        ChoiceEncoder(codec(direction), 40).encode_all([choice])


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("copies", [0, 1, 3, 30])
def test_windows_score_every_id_of_a_document_once(
    codec: Codecs, direction: Direction, copies: int
) -> None:
    codec = codec(direction)
    text = "the captain of the river " * copies
    windows = ChoiceEncoder(codec, 40).document_windows(text)

    assert [i for one in windows for i in one.written] == codec.encode(text).tolist()
    assert all(1 <= len(one.given) + len(one.written) - 1 <= 40 for one in windows)


def test_a_scoring_is_of_backward_models() -> None:
    assert require_scoring(None, Direction.FORWARD) is Scoring.QUESTION
    assert require_scoring("joint", Direction.BACKWARD) is Scoring.JOINT
    with pytest.raises(ConfigError, match="writes forward"):
        require_scoring("joint", Direction.FORWARD)
    with pytest.raises(ConfigError, match="question, joint, normalized, ratio"):
        require_scoring("best", Direction.BACKWARD)
