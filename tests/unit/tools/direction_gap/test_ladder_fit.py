"""The fit of a ladder: exact lines, errors, and quantities that do not vary."""

import math

import numpy as np
import pytest

from tools.direction_gap.ladder_fit import fit_gaps

SIZES, TOKENS = (100_000, 400_000, 1_600_000), (150_000, 300_000)


def line(num_parameters: int, tokens: int) -> float:
    return 0.2 + 0.3 * math.log10(num_parameters / 400_000) - 0.1 * math.log10(tokens / 150_000)


def test_gaps_on_a_line_are_fitted_exactly() -> None:
    fit = fit_gaps([(size, tokens, line(size, tokens)) for size in SIZES for tokens in TOKENS])

    assert fit.per_parameters is not None
    assert fit.per_tokens is not None
    assert fit.per_parameters.value == pytest.approx(0.3)
    assert fit.per_tokens.value == pytest.approx(-0.1)
    assert fit.mean_parameters == pytest.approx(400_000)
    assert fit.center.value == pytest.approx(line(400_000, round(math.sqrt(150e3 * 300e3))))
    assert fit.scatter == pytest.approx(0, abs=1e-9)
    assert fit.at(1_600_000, 300_000) == pytest.approx(line(1_600_000, 300_000))


def test_standard_errors_are_the_scatter_of_repeated_fits() -> None:
    random = np.random.default_rng(0)
    fits = [
        fit_gaps(
            [
                (size, tokens, line(size, tokens) + 0.2 * float(random.normal()))
                for size in SIZES
                for tokens in TOKENS
                for _ in range(3)
            ]
        )
        for _ in range(400)
    ]
    for name in ("center", "per_parameters", "per_tokens"):
        estimates = [getattr(fit, name) for fit in fits]
        scatter = np.std([estimate.value for estimate in estimates])
        assert np.mean([estimate.error for estimate in estimates]) == pytest.approx(
            scatter, rel=0.1
        )


@pytest.mark.parametrize(
    ("pairs", "has_slopes"),
    [
        ([(10**5, 1000, 0.1), (10**6, 1000, 0.5), (10**6, 1000, 0.7)], (True, False)),
        ([(10**5, 1000, 0.1), (10**5, 2000, 0.5), (10**5, 2000, 0.7)], (False, True)),
        ([(10**5, 1000, 0.1), (10**6, 2000, 0.5), (10**6, 2000, 0.7)], (False, False)),
    ],
    ids=["one-budget", "one-size", "both-at-once"],
)
def test_only_slopes_that_the_data_can_show_are_fitted(
    pairs: list[tuple[int, int, float]], has_slopes: tuple[bool, bool]
) -> None:
    fit = fit_gaps(pairs)

    assert (fit.per_parameters is not None, fit.per_tokens is not None) == has_slopes
    assert fit.center.error is not None


def test_as_many_terms_as_pairs_have_no_errors() -> None:
    fit = fit_gaps([(10**5, 1000, 0.1)])

    assert (fit.center.value, fit.center.error, fit.scatter) == (pytest.approx(0.1), None, None)
