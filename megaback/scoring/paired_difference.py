"""Difference of two models' losses on the same documents, with a paired standard error.

Each loss is a ratio of sums over documents, nats over targets. Their difference is linearized in
the documents (Cochran, "Sampling Techniques", 1977, section 6.3): difficulty that both models
share cancels, and documents are weighted by length. Loads no torch. Shapes: N documents.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Losses:
    """Nats and number of targets of each document: shape (N,) each."""

    nats_N: Floats
    targets_N: Floats

    @property
    def per_token(self) -> float:
        return float(self.nats_N.sum() / self.targets_N.sum())

    @property
    def num_targets(self) -> float:
        return float(self.targets_N.sum())

    @classmethod
    def mean(cls, several: "Iterable[Losses]") -> "Losses":
        """Mean over models that were measured on the same documents."""
        measured = list(several)
        return cls(
            np.mean([one.nats_N for one in measured], axis=0),
            np.mean([one.targets_N for one in measured], axis=0),
        )


@dataclass(frozen=True, kw_only=True)
class PairedDifference:
    """Losses in nats/token and the excess of `second`, with standard errors over documents.

    The errors are None if fewer than two documents have targets.
    """

    first: float
    second: float
    nats: float
    nats_error: float | None
    percent: float
    """Difference in percent of the first."""
    percent_error: float | None
    num_targets: float
    """Number of targets of the first."""
    num_documents: int

    @classmethod
    def between(cls, first: Losses, second: Losses) -> "PairedDifference":
        """Difference of two losses; both need targets, though not in every document."""
        of_first, of_second = first.per_token, second.per_token
        ratio = of_second / of_first
        residuals_N = _residuals(second) - _residuals(first)
        # Linearized: d(s / f) = (ds - ratio df) / f.
        of_ratio_N = (_residuals(second) - ratio * _residuals(first)) / of_first
        has_targets_N = (first.targets_N > 0) | (second.targets_N > 0)
        return cls(
            first=of_first,
            second=of_second,
            nats=of_second - of_first,
            nats_error=_standard_error(residuals_N[has_targets_N]),
            percent=100 * (ratio - 1),
            percent_error=_standard_error(100 * of_ratio_N[has_targets_N]),
            num_targets=first.num_targets,
            num_documents=int(has_targets_N.sum()),
        )


def _residuals(losses: Losses) -> Floats:
    """Each document's contribution to the loss beyond its share; they sum to 0."""
    residuals: Floats = (losses.nats_N - losses.per_token * losses.targets_N) / (
        losses.targets_N.sum()
    )
    return residuals


def _standard_error(residuals_N: Floats) -> float | None:
    """Standard error of a sum of independent residuals, whose mean of 0 is fitted."""
    number = len(residuals_N)
    if number < 2:
        return None
    return float(np.sqrt(number / (number - 1) * np.square(residuals_N).sum()))


def standard_error_of_mean(values: Sequence[float]) -> float | None:
    """Standard error of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))
