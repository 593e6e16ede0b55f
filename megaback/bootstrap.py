"""How far a mean could be off, had other rows been drawn: percentile bootstrap intervals.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100
_TAIL_PERCENT = 2.5


@dataclass(frozen=True)
class Interval:
    """A value, and the bounds between which 95% of its resamples lie."""

    value: float
    low: float
    high: float

    def to_dict(self) -> dict[str, float]:
        return {
            "value": round(self.value, 6),
            "low": round(self.low, 6),
            "high": round(self.high, 6),
        }

    def scaled(self, factor: float) -> "Interval":
        return Interval(self.value * factor, self.low * factor, self.high * factor)


def mean_interval(values: "Sequence[float] | npt.NDArray[np.float64]", seed: int = 0) -> Interval:
    """Of the mean over rows, at least one. The same values and seed give the same interval."""
    return ratio_interval(values, np.ones(len(values)), seed)


def ratio_interval(
    numerators: "Sequence[float] | npt.NDArray[np.float64]",
    denominators: "Sequence[float] | npt.NDArray[np.float64]",
    seed: int = 0,
) -> Interval:
    """Of the ratio of two sums over rows, such as nats and bytes: rows are drawn, with both."""
    above_N = np.asarray(numerators, dtype=np.float64)
    below_N = np.asarray(denominators, dtype=np.float64)
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        drawn_RN = generator.integers(len(above_N), size=(_RESAMPLES_AT_ONCE, len(above_N)))
        ratios.append(above_N[drawn_RN].sum(axis=1) / below_N[drawn_RN].sum(axis=1))
    low, high = np.percentile(np.concatenate(ratios), [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
    return Interval(float(above_N.sum() / below_N.sum()), float(low), float(high))
