"""Confidence intervals of means by the percentile bootstrap over rows.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

MIN_ROWS = 2
"""Minimum number of rows: with fewer, every resample is the same row."""
NO_INTERVAL = f"no 95% interval is shown: it needs at least {MIN_ROWS} rows"

_RESAMPLES = 2000
_RESAMPLES_AT_ONCE = 100
_TAIL_PERCENT = 2.5


@dataclass(frozen=True)
class Interval:
    """A value and the bounds of 95% of its resamples; None for the bounds of a single row."""

    value: float
    low: float | None
    high: float | None

    def to_dict(self) -> dict[str, float | None]:
        return {
            "value": round(self.value, 6),
            "low": None if self.low is None else round(self.low, 6),
            "high": None if self.high is None else round(self.high, 6),
        }

    def scaled(self, factor: float) -> "Interval":
        if self.low is None or self.high is None:
            return Interval(self.value * factor, None, None)
        return Interval(self.value * factor, self.low * factor, self.high * factor)

    @property
    def between(self) -> str:
        """The bounds for a table; a dash without them."""
        if self.low is None or self.high is None:
            return "-"
        return f"{self.low:.3f} to {self.high:.3f}"


def mean_interval(values: "Sequence[float] | npt.NDArray[np.float64]", seed: int = 0) -> Interval:
    """Interval of the mean over rows, at least one. Equal values and seeds give equal intervals."""
    return ratio_interval(values, np.ones(len(values)), seed)


def ratio_interval(
    numerators: "Sequence[float] | npt.NDArray[np.float64]",
    denominators: "Sequence[float] | npt.NDArray[np.float64]",
    seed: int = 0,
) -> Interval:
    """Interval of the ratio of two sums over rows, such as nats per byte; rows are resampled."""
    above_N = np.asarray(numerators, dtype=np.float64)
    below_N = np.asarray(denominators, dtype=np.float64)
    value = float(above_N.sum() / below_N.sum())
    if len(above_N) < MIN_ROWS:
        return Interval(value, None, None)
    generator = np.random.default_rng(seed)
    ratios = []
    for _ in range(_RESAMPLES // _RESAMPLES_AT_ONCE):
        drawn_RN = generator.integers(len(above_N), size=(_RESAMPLES_AT_ONCE, len(above_N)))
        ratios.append(above_N[drawn_RN].sum(axis=1) / below_N[drawn_RN].sum(axis=1))
    low, high = np.percentile(np.concatenate(ratios), [_TAIL_PERCENT, 100 - _TAIL_PERCENT])
    return Interval(value, float(low), float(high))
