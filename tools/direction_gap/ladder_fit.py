"""Least-squares fit of the direction gap to the logarithms of model size and training tokens.

    gap in percent = center + per_parameters log10(N / N0) + per_tokens log10(T / T0)

N0 and T0 are geometric means, so that `center` is the gap in the middle of the measured range. The
unit is a pair of one seed, not a mean: its scatter shows the variation between trainings, which a
few seeds per rung are too few to weigh by. Every pair counts the same.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """Value with its standard error, None without degrees of freedom."""

    value: float
    error: float | None


@dataclass(frozen=True)
class GapFit:
    """Fit over all pairs; a slope is None if its quantity does not vary."""

    center: Estimate
    """Gap at the geometric means, in percent."""
    per_parameters: Estimate | None
    """Change of the gap per tenfold number of parameters, in percentage points."""
    per_tokens: Estimate | None
    """Change of the gap per tenfold number of training tokens, in percentage points."""
    mean_parameters: float
    """Geometric mean of the numbers of parameters, N0."""
    mean_tokens: float
    """Geometric mean of the numbers of training tokens, T0."""
    scatter: float | None
    """Standard deviation of a pair about the fit, in percentage points."""
    num_pairs: int

    def at(self, num_parameters: float, num_tokens: float) -> float:
        """The fitted gap, in percent."""
        gap = self.center.value
        for slope, value, mean in (
            (self.per_parameters, num_parameters, self.mean_parameters),
            (self.per_tokens, num_tokens, self.mean_tokens),
        ):
            if slope is not None:
                gap += slope.value * float(np.log10(value / mean))
        return gap


def fit_gaps(pairs: Sequence[tuple[int, int, float]]) -> GapFit:
    """Fit of (parameters, tokens, gap in percent), one per pair of models."""
    sizes_N, tokens_N, gaps_N = (
        np.array(column, dtype=np.float64) for column in zip(*pairs, strict=True)
    )
    logs_N2 = np.log10(np.stack([sizes_N, tokens_N], axis=1))
    means_2 = logs_N2.mean(axis=0)
    varies = [len(set(column)) > 1 for column in (sizes_N.tolist(), tokens_N.tolist())]
    if all(varies) and np.linalg.matrix_rank(logs_N2 - means_2) < 2:
        varies = [False, False]  # larger models with more tokens only: neither slope is known
    design_NK = np.column_stack([np.ones(len(pairs)), (logs_N2 - means_2)[:, varies]])
    coefficients_K = np.linalg.lstsq(design_NK, gaps_N, rcond=None)[0]
    freedom = len(pairs) - design_NK.shape[1]
    scatter: float | None = None
    errors_K: list[float | None] = [None] * design_NK.shape[1]
    if freedom > 0:
        residuals_N = gaps_N - design_NK @ coefficients_K
        variance = float(np.square(residuals_N).sum()) / freedom
        scatter = variance**0.5
        covariance_KK = variance * np.linalg.inv(design_NK.T @ design_NK)
        errors_K = np.sqrt(np.diag(covariance_KK)).tolist()
    estimates = iter(map(Estimate, coefficients_K.tolist(), errors_K))
    return GapFit(
        center=next(estimates),
        per_parameters=next(estimates) if varies[0] else None,
        per_tokens=next(estimates) if varies[1] else None,
        mean_parameters=float(10 ** means_2[0]),
        mean_tokens=float(10 ** means_2[1]),
        scatter=scatter,
        num_pairs=len(pairs),
    )
