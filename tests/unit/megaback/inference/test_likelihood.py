"""Likelihoods of continuations are those of a plain forward pass, however they are packed."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megaback.inference.likelihood import (
    Continuation,
    in_packs,
    log_probabilities,
    log_probability_steps,
    next_log_probability_steps,
    token_log_probabilities,
)
from megaback.inference.steps import finish
from tests.helpers.small_models import VOCAB_SIZE, make_model, packed

IDS = st.lists(st.integers(0, VOCAB_SIZE - 1), max_size=12)
CONTINUATIONS = st.lists(
    st.builds(Continuation, given=IDS.filter(bool), written=IDS), min_size=1, max_size=6
)


@torch.no_grad()
def next_logs(ids: Sequence[int]) -> torch.Tensor:
    """log P of every id after each of these: shape (T, V)."""
    return make_model().logits(torch.tensor(ids), *packed(len(ids))).double().log_softmax(-1)


def expected(one: Continuation) -> list[float]:
    logs_TV = next_logs([*one.given, *one.written])[len(one.given) - 1 :]
    return [float(logs_TV[at, written_id]) for at, written_id in enumerate(one.written)]


@settings(max_examples=15)
@given(continuations=CONTINUATIONS)
def test_each_likelihood_is_that_of_a_plain_forward_pass(
    continuations: list[Continuation],
) -> None:
    model = make_model()

    terms = token_log_probabilities(model, continuations)

    assert [len(terms_W) for terms_W in terms] == [len(one.written) for one in continuations]
    for one, terms_W in zip(continuations, terms, strict=True):
        assert terms_W.tolist() == pytest.approx(expected(one), abs=1e-4)
    sums = [float(terms_W.sum()) for terms_W in terms]
    assert log_probabilities(model, continuations) == pytest.approx(sums)


@settings(max_examples=15)
@given(continuations=CONTINUATIONS, tokens_at_once=st.integers(1, 40))
def test_the_size_of_a_forward_pass_changes_nothing(
    continuations: list[Continuation], tokens_at_once: int
) -> None:
    model = make_model()

    in_parts = finish(log_probability_steps(model, continuations, tokens_at_once))

    assert in_parts == pytest.approx(log_probabilities(model, continuations), abs=1e-4)


@settings(max_examples=15)
@given(continuations=CONTINUATIONS)
def test_in_bf16_a_pack_is_as_each_alone_and_near_fp32(
    continuations: list[Continuation],
) -> None:
    """At most 0 and 0.056 nats per token were seen on a CPU; a GPU may use other kernels."""
    model = make_model().to(torch.bfloat16)

    packed_terms = token_log_probabilities(model, continuations)

    exact = token_log_probabilities(make_model(), continuations)
    for one, terms_W, exact_W in zip(continuations, packed_terms, exact, strict=True):
        (alone_W,) = token_log_probabilities(model, [one])
        assert terms_W.dtype is torch.float64
        assert terms_W.tolist() == pytest.approx(alone_W.tolist(), abs=0.01)
        assert terms_W.tolist() == pytest.approx(exact_W.tolist(), abs=0.15)


@settings(max_examples=15)
@given(begun=IDS.filter(bool), first=IDS, second=IDS)
def test_the_likelihood_of_a_continuation_is_the_sum_of_its_parts(
    begun: list[int], first: list[int], second: list[int]
) -> None:
    whole, one, other = log_probabilities(
        make_model(),
        [
            Continuation(begun, [*first, *second]),
            Continuation(begun, first),
            Continuation([*begun, *first], second),
        ],
    )
    assert whole == pytest.approx(one + other, abs=1e-4)


@settings(max_examples=15)
@given(continuations=CONTINUATIONS, tokens_at_once=st.sampled_from([1, 20, 8192]))
def test_next_log_probabilities_are_those_of_the_model(
    continuations: list[Continuation], tokens_at_once: int
) -> None:
    model, ids = make_model(), [7, 0, 50]
    steps = next_log_probability_steps(model, continuations, ids, tokens_at_once)
    for one, (own_W, next_WC) in zip(continuations, finish(steps), strict=True):
        assert own_W.tolist() == pytest.approx(expected(one), abs=1e-4)
        logs_WV = next_logs([*one.given, *one.written])[len(one.given) :]
        torch.testing.assert_close(next_WC.double(), logs_WV[:, ids], atol=1e-4, rtol=0)


@given(lengths=st.lists(st.integers(1, 20_000), max_size=30))
def test_packs_contain_each_continuation_once_and_fit_a_forward_pass(lengths: list[int]) -> None:
    continuations = [Continuation([5], range(length - 1)) for length in lengths]

    packs = in_packs(continuations)

    assert sorted(number for pack in packs for number in pack) == list(range(len(lengths)))
    for pack in packs:
        assert len(pack) == 1 or sum(lengths[number] for number in pack) <= 8192
    in_order = [lengths[number] for pack in packs for number in pack]
    assert in_order == sorted(lengths)
