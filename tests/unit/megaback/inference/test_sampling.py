"""Sampling: transformers' filters, exact probabilities, a stream of numbers per row."""

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from data_pipeline.errors import ConfigError
from megaback.inference.sampling import SamplingOptions, candidates, penalized
from tests.helpers.decoding import chosen

VOCAB_SIZE = 50


def random_logits(seed: int, rows: int = 3) -> torch.Tensor:
    return 3 * torch.randn(rows, VOCAB_SIZE, generator=torch.manual_seed(seed))


def streams(rows: int) -> list[np.random.Generator]:
    """Each row's own random numbers."""
    return [np.random.default_rng(seed) for seed in range(rows)]


@settings(max_examples=50)
@given(
    seed=st.integers(0, 10_000),
    temperature=st.floats(0.2, 3),
    top_k=st.integers(0, VOCAB_SIZE + 5),
    top_p=st.floats(0.05, 1),
    min_p=st.floats(0, 0.9),
)
def test_the_candidates_and_their_probabilities_are_those_of_transformers(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    logits_BV = random_logits(seed)
    warpers = [TemperatureLogitsWarper(temperature)]
    warpers += [TopKLogitsWarper(top_k)] if top_k else []
    warpers += [TopPLogitsWarper(top_p)] if top_p < 1 else []
    warpers += [MinPLogitsWarper(min_p)] if min_p else []
    expected_BV = LogitsProcessorList(warpers)(torch.zeros(3, 1), logits_BV.clone()).softmax(-1)
    options = SamplingOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)

    relative_BC, ids_BC = candidates(logits_BV, options)

    found_BV = relative_BC / relative_BC.sum(-1, keepdim=True)
    if ids_BC is not None:
        found_BV = torch.zeros_like(logits_BV).scatter(1, ids_BC, found_BV)
    torch.testing.assert_close(found_BV, expected_BV, atol=1e-5, rtol=1e-4)


def test_the_repetition_penalty_is_that_of_transformers() -> None:
    logits_BV = random_logits(0)
    ids_BT = torch.tensor([[1, 2, 2, 7], [0, 9, 9, 9], [49, 48, 1, 1]])
    seen_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(1, ids_BT, True)

    expected_BV = RepetitionPenaltyLogitsProcessor(1.7)(ids_BT, logits_BV.clone())

    assert torch.equal(penalized(logits_BV, seen_BV, 1.7), expected_BV)


@pytest.mark.parametrize("top_k", [0, 4])
def test_frequencies_of_ids_match_their_probabilities(top_k: int) -> None:
    logits_BV = torch.tensor([[2.0, 1.0, 0.0, -1.0, -torch.inf]]).repeat(20_000, 1)
    options = SamplingOptions(temperature=1, top_k=top_k)

    ids = chosen(logits_BV, options, streams(20_000))

    counts = torch.bincount(torch.tensor(ids), minlength=5)

    assert counts[4] == 0
    expected = 20_000 * logits_BV[0].softmax(-1)
    assert (counts - expected).abs().max() < 4 * expected.max().sqrt()


def test_each_row_draws_from_its_own_stream() -> None:
    logits_BV = torch.zeros(3, VOCAB_SIZE)
    options = SamplingOptions(temperature=1, top_k=0, seed=5)
    together, (*_, apart) = streams(3), streams(3)

    all_rows = [chosen(logits_BV, options, together) for _ in range(20)]
    last_row = [chosen(logits_BV[:1], options, [apart])[0] for _ in range(20)]

    assert [ids[2] for ids in all_rows] == last_row
    assert len({tuple(column) for column in zip(*all_rows, strict=True)}) == 3


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"top_p": 0},
        {"top_p": 1.5},
        {"min_p": -0.1},
        {"max_new_tokens": 0},
        {"top_k": -1},
        {"repetition_penalty": 0},
        {"temperature": float("nan")},
    ],
    ids=str,
)
def test_options_out_of_range_are_refused_by_name(wrong: dict[str, float]) -> None:
    (name,) = wrong
    with pytest.raises(ConfigError, match=name):
        SamplingOptions(**wrong)


@settings(max_examples=200)
@given(
    seed=st.integers(0, 100),
    temperature=st.floats(0, 100),
    top_k=st.integers(0, VOCAB_SIZE),
    top_p=st.floats(0, 1, exclude_min=True),
    min_p=st.floats(0, 1),
    penalty=st.floats(0.01, 100),
)
@example(0, 1.0, 0, 1.3051366284759888e-153, 0.0, 1.0)
@example(0, 5e-324, 0, 1.0, 0.0, 1.0)
def test_the_chosen_id_is_always_possible(
    seed: int, temperature: float, top_k: int, top_p: float, min_p: float, penalty: float
) -> None:
    options = SamplingOptions(
        temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=penalty
    )
    logits_BV = 50 * random_logits(seed)
    logits_BV[:, ::2] = -torch.inf
    seen_BV = torch.rand(logits_BV.shape, generator=torch.manual_seed(seed)) < 0.5
    logits_BV = penalized(logits_BV, seen_BV, penalty)

    ids = chosen(logits_BV, options, streams(3))

    assert all(logits_BV[row, choice] > -torch.inf for row, choice in enumerate(ids))
