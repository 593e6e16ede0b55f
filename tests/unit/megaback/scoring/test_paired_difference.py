"""The difference between two models on the same documents, and its standard error."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.scoring.paired_difference import Losses, PairedDifference, standard_error_of_mean


def some_losses(seed: int, documents: int = 200) -> tuple[Losses, Losses]:
    """Documents of different length and difficulty; the second model is slightly worse."""
    generator = np.random.default_rng(seed)
    targets_N = generator.integers(5, 500, documents).astype(float)
    hard_N = generator.normal(4, 1, documents)
    noises = generator.normal(0, 0.1, (2, documents))
    first, second = (
        Losses(targets_N * (hard_N + worse + noise_N), targets_N)
        for worse, noise_N in zip((0.0, 0.05), noises, strict=True)
    )
    return first, second


@given(st.integers(0, 1000))
def test_exchanging_the_models_changes_the_sign(seed: int) -> None:
    first, second = some_losses(seed)

    there, back = PairedDifference.between(first, second), PairedDifference.between(second, first)

    assert there.nats == pytest.approx(-back.nats)
    assert there.nats_error == pytest.approx(back.nats_error)
    assert (1 + there.percent / 100) * (1 + back.percent / 100) == pytest.approx(1)


def test_a_model_does_not_differ_from_itself() -> None:
    first, _ = some_losses(0)

    gap = PairedDifference.between(first, first)

    assert (gap.nats, gap.nats_error, gap.percent, gap.percent_error) == (0, 0, 0, 0)


def test_a_difference_that_is_equal_at_every_target_has_no_error() -> None:
    first, _ = some_losses(0)

    gap = PairedDifference.between(
        first, Losses(first.nats_N + 0.25 * first.targets_N, first.targets_N)
    )

    assert gap.nats == pytest.approx(0.25)
    assert gap.nats_error == pytest.approx(0, abs=1e-12)


def test_with_documents_of_one_length_the_error_is_that_of_a_paired_mean() -> None:
    first, second = some_losses(1)
    targets_N = np.full(200, 7.0)
    first, second = Losses(first.nats_N, targets_N), Losses(second.nats_N, targets_N)

    differences_N = (second.nats_N - first.nats_N) / 7

    gap = PairedDifference.between(first, second)
    assert gap.nats == pytest.approx(differences_N.mean())
    assert gap.nats_error == pytest.approx(differences_N.std(ddof=1) / np.sqrt(200))


@pytest.mark.parametrize("seed", [1, 2])
def test_the_errors_are_those_of_resampling_documents(seed: int) -> None:
    first, second = some_losses(seed)
    generator = np.random.default_rng(0)
    nats, percents = [], []
    for _ in range(2000):
        drawn_N = generator.integers(0, 200, 200)
        gap = PairedDifference.between(
            *(Losses(one.nats_N[drawn_N], one.targets_N[drawn_N]) for one in (first, second))
        )
        nats.append(gap.nats)
        percents.append(gap.percent)

    gap = PairedDifference.between(first, second)

    assert gap.nats_error == pytest.approx(np.std(nats), rel=0.08)
    assert gap.percent_error == pytest.approx(np.std(percents), rel=0.08)


def test_models_may_have_different_targets_in_a_document() -> None:
    first = Losses(np.array([8.0, 0.0, 3.0]), np.array([2.0, 0.0, 1.0]))
    second = Losses(np.array([4.0, 5.0, 0.0]), np.array([1.0, 1.0, 0.0]))

    gap = PairedDifference.between(first, second)

    assert gap.nats == pytest.approx(9 / 2 - 11 / 3)
    assert gap.num_documents == 3


def test_one_document_or_one_seed_has_no_error() -> None:
    gap = PairedDifference.between(
        *(Losses(np.array([nats]), np.array([2.0])) for nats in (4.0, 5.0))
    )

    assert (gap.nats, gap.nats_error, gap.percent_error) == (0.5, None, None)
    assert standard_error_of_mean([0.1]) is None
    assert standard_error_of_mean([0.0, 2.0]) == pytest.approx(1.0)
