"""Weights of data sets over training, as the changes of a mixture.

Positions of training are fractions of it, or tokens. A linear weight is a staircase of `STAIRS`
equal steps between two positions, each with the weight in its middle.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf

import numpy as np
import numpy.typing as npt

from data_pipeline.loading.mixture import Change, Mixture, Spans

STAIRS = 256
MAX_ROW = 1 << 62
_ROWS_OF_MEAN = 1 << 40


@dataclass(frozen=True)
class Weight:
    """Weight of a data set, by position of training."""

    points: tuple[tuple[float, float], ...]
    """(position, weight) pairs, by increasing position from 0."""
    is_linear: bool = False
    """Whether weights between two positions are on a line, instead of those of the first one."""

    @property
    def is_constant(self) -> bool:
        return len({weight for _, weight in self.points}) == 1

    def after(self, position: float) -> float:
        """Weight from a position on."""
        return self._at(position, bisect_right)

    def before(self, position: float) -> float:
        """Weight shortly before a position above 0."""
        return self._at(position, bisect_left)

    def between(self, positions_N: npt.NDArray[np.float64]) -> list[float]:
        """Weights at positions between two neighboring ones of `positions_of`."""
        if not self.is_linear:
            return [self.after(position) for position in positions_N[:1]] * len(positions_N)
        positions, weights = zip(*self.points, strict=True)
        found: list[float] = np.interp(positions_N, positions, weights).tolist()
        return found

    def _at(self, position: float, bisect: Callable[[tuple[float, ...], float], int]) -> float:
        positions, weights = zip(*self.points, strict=True)
        if self.is_linear:
            return float(np.interp(position, positions, weights))
        weight: float = weights[bisect(positions, position) - 1]
        return weight


@dataclass(frozen=True)
class Limit:
    """Maximum number of rows that are read of a data set."""

    rows: int
    ends_run: bool
    """Whether the run ends there, instead of continuing with the other data sets."""


@dataclass(frozen=True)
class Limited:
    """A mixture in which no data set exceeds its limit, up to its end."""

    mixture: Mixture
    dropped: dict[int, int]
    """Row of the mixture from which on a data set that has reached its limit is not read."""
    end: tuple[int, int] | None
    """Row at which the run ends, and the data set whose limit ends it."""


def positions_of(weights: Sequence[Weight]) -> list[float]:
    """Every position at which a weight begins to change, by increasing position from 0."""
    return sorted({position for weight in weights for position, _ in weight.points})


def moment_without_data(weights: Sequence[Weight], end: float = inf) -> float | None:
    """The first position before `end` from which on every weight is 0 for a time; or None."""
    for begin, stop in pairwise([*positions_of(weights), inf]):
        is_empty = not any(one.after(begin) or one.before(stop) for one in weights)
        if is_empty and begin < end:
            return begin
    return None


def changes_of(weights: Sequence[Weight], row_of: Callable[[float], int]) -> list[Change]:
    """Weights from rows of a mixture on, the first from row 0; `row_of` maps positions to rows."""
    found: dict[int, tuple[float, ...]] = {}
    for begin, stop in pairwise([*positions_of(weights), inf]):
        first = row_of(begin)
        if any(one.after(begin) != one.before(stop) for one in weights):
            rows = row_of(stop) - first
            stairs = min(STAIRS, rows)
            middles = begin + (stop - begin) * (np.arange(stairs) + 0.5) / max(stairs, 1)
            values = zip(*(one.between(middles) for one in weights), strict=True)
            for stair, of_stair in enumerate(values):
                found[first + rows * stair // stairs] = of_stair
        else:
            found[first] = tuple(one.after(begin) for one in weights)
    return [
        Change(row, values)
        for row, values in found.items()
        if any(values) and row <= MAX_ROW  # later ones are never reached
    ]


def peak_shares(weights: Sequence[Weight]) -> list[float]:
    """The largest share of each data set at any time."""
    # Between two positions, a share only rises or only falls.
    moments = [
        values
        for begin, stop in pairwise([*positions_of(weights), inf])
        for values in ([one.after(begin) for one in weights], [one.before(stop) for one in weights])
        if any(values)
    ]
    shares = [Mixture(values).shares for values in moments]
    return [max(of_data_set) for of_data_set in zip(*shares, strict=True)]


def mean_shares(weights: Sequence[Weight]) -> list[float]:
    """Shares of all rows of a training whose weights are given at fractions of it."""
    spans = Spans(len(weights))
    for change in changes_of(weights, lambda fraction: round(fraction * _ROWS_OF_MEAN)):
        spans.begin(change)
    counts = spans.counts(_ROWS_OF_MEAN - spans.first_row[-1])
    return [count / _ROWS_OF_MEAN for count in counts]


def limited(changes: Sequence[Change], limits: Sequence[Limit | None], num_rows: int) -> Limited:
    """The mixture of `changes`, of which each data set takes part until it has reached its limit.

    Its weight is 0 from then on. The end is where a limit ends the run, or no data set is left.
    Limits that the first `num_rows` rows do not reach are ignored.
    """
    spans, dropped = Spans(len(limits)), dict[int, int]()
    for change, stop in zip(
        changes, [*(one.first_row for one in changes[1:]), num_rows], strict=True
    ):
        row: int | None = change.first_row
        while row is not None:
            weights = tuple(0.0 if n in dropped else one for n, one in enumerate(change.weights))
            if not any(weights):
                last = max(dropped, key=lambda n: dropped[n])
                return Limited(Mixture.of_spans(spans), dropped, (row, last))
            spans.begin(Change(row, weights))
            rows = max(min(stop, num_rows, MAX_ROW) - row, 0)
            counts = spans.counts(rows)
            reached = [
                (spans.find(number, limit.rows, rows), number)
                for number, limit in enumerate(limits)
                if limit is not None and counts[number] > limit.rows
            ]
            row, number = min(reached, default=(None, 0))
            limit = limits[number]
            if row is not None and limit is not None:
                if limit.ends_run:
                    return Limited(Mixture.of_spans(spans), dropped, (row, number))
                dropped[number] = row
    return Limited(Mixture.of_spans(spans), dropped, None)
