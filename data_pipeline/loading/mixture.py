"""Weighted mixture of data sets, by index arithmetic.

Row n of the mixture, counted over all steps, is row m of one of the data sets. Data sets alternate
as evenly as their weights allow (each as Bresenham's algorithm draws a line), so that any range of
rows has each data set's share, within one row per data set.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ConfigError

Indices = npt.NDArray[np.int64]

_RESOLUTION = 1 << 20


class Mixture:
    """Deals rows to data sets by weight. One data set gets every row."""

    def __init__(self, weights: Sequence[float]) -> None:
        """Shares are rounded to a millionth, but never to 0.

        Raises ConfigError for a weight that is not above 0.
        """
        if not weights or not all(0 < weight < float("inf") for weight in weights):
            raise ConfigError(f"weights of data sets must be above 0, got {list(weights)}")
        # Divided first, as the sum of large weights could be infinite.
        ratios = [weight / max(weights) for weight in weights]
        parts = [max(1, round(ratio / sum(ratios) * _RESOLUTION)) for ratio in ratios]
        # Data set k takes parts[k] of every self._of[k] rows that remain after earlier ones.
        self._parts = parts
        self._of = [sum(parts[number:]) for number in range(len(parts))]

    @property
    def shares(self) -> list[float]:
        """Share of the rows that each data set provides; they add up to 1."""
        return [part / self._of[0] for part in self._parts]

    def deal(self, number: Indices) -> tuple[Indices, Indices]:
        """Data set, and row within it, of each row of the mixture."""
        if len(self._parts) == 1:
            return np.zeros_like(number), number
        # The deal is periodic; within a period the products below do not overflow.
        period, number = np.divmod(number, self._of[0])
        data_set, row = self._deal_within_period(number)
        parts: Indices = np.array(self._parts, dtype=np.int64)
        row += period * parts[data_set]
        return data_set, row

    def _deal_within_period(self, number: Indices) -> tuple[Indices, Indices]:
        data_set = np.full_like(number, len(self._parts) - 1)
        row = number.copy()
        undecided = np.ones(number.shape, dtype=np.bool_)
        for index in range(len(self._parts) - 1):
            given = self._given(index, row)
            is_mine = undecided & (self._given(index, row + 1) > given)
            data_set[is_mine] = index
            row = np.where(is_mine, given, np.where(undecided, row - given, row))
            undecided &= ~is_mine
        return data_set, row

    def number_of(self, data_set: int, row: Indices) -> Indices:
        """Row of the mixture of each row of a data set: the inverse of `deal`."""
        period, number = np.divmod(row, self._parts[data_set])
        row = number
        if data_set < len(self._parts) - 1:
            part, of = self._parts[data_set], self._of[data_set]
            number = -((of // 2 - (row + 1) * of) // part) - 1
        for index in reversed(range(data_set)):
            part, of = self._parts[index], self._of[index]
            number = (number * of + of // 2) // (of - part)
        result: Indices = number + period * self._of[0]
        return result

    def _given(self, index: int, left: Indices) -> Indices:
        """Number of the first `left` rows after earlier data sets that this data set takes."""
        of = self._of[index]
        return (left * self._parts[index] + of // 2) // of
