"""Weighted mixture of data sets, by index arithmetic.

Row n of the mixture, counted over all steps, is row m of one of the data sets. Data sets alternate
as evenly as their weights allow (each as Bresenham's algorithm draws a line), so that any range of
rows has each data set's share, within one row for each other data set.

Weights may change at given rows. Between two changes shares are constant: each such span has a line
per data set, which begins where rounding in earlier spans has left it, so that errors do not add
up. Memory is a few numbers per data set and change, whatever the number of rows.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import inf

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ConfigError

Indices = npt.NDArray[np.int64]

_RESOLUTION = 1 << 20
_ROW = 1 << 40
"""Units of a row in which errors of rounding are counted."""
NEVER = -1
"""Number of a row that the mixture never deals, since its data set's weight stays 0."""


@dataclass(frozen=True)
class Change:
    """Weights from a row of the mixture on."""

    first_row: int
    weights: tuple[float, ...]


class Spans:
    """Spans of a mixture, begun in order; the last one is unbounded."""

    def __init__(self, num_data_sets: int) -> None:
        self.first_row: list[int] = []
        # Data set k takes parts[k] of every of[k] rows that remain after earlier ones, as if
        # phases[k] / of[k] of a row had been due before the span.
        self.parts: list[list[int]] = []
        self.of: list[list[int]] = []
        self.phases: list[list[int]] = []
        self.before: list[list[int]] = []
        """Number of rows of each data set before each span."""
        self._late = [0] * num_data_sets  # rows that are due and not dealt, in units of 1 / _ROW
        self._counted: tuple[int, list[int]] | None = None  # the latest counts of the last span

    def begin(self, change: Change) -> None:
        """End the last span and begin the next one. Raises ConfigError for invalid weights."""
        before = [0] * len(change.weights)
        if self.first_row:
            num_rows = change.first_row - self.first_row[-1]
            before = self.counts(num_rows)
            all_parts = self.of[-1][0]
            for number, (part, count) in enumerate(zip(self.parts[-1], before, strict=True)):
                dealt = count - self.before[-1][number]
                self._late[number] += num_rows * part * _ROW // all_parts - dealt * _ROW
        parts = _parts_of(change.weights)
        of = list(accumulate(reversed(parts)))[::-1]
        self.first_row.append(change.first_row)
        self.parts.append(parts)
        self.of.append(of)
        self.phases.append(_phases(parts, of, self._late))
        self.before.append(before)
        self._counted = None

    def counts(self, num_rows: int) -> list[int]:
        """Number of rows of each data set before and among the first rows of the last span."""
        if self._counted is None or self._counted[0] != num_rows:
            dealt = _counts(num_rows, self.parts[-1], self.of[-1], self.phases[-1])
            counts = [a + b for a, b in zip(self.before[-1], dealt, strict=True)]
            self._counted = num_rows, counts
        return self._counted[1]

    def find(self, data_set: int, row: int, num_rows: int) -> int:
        """Row of the mixture that is a row of a data set, among the first rows of the last span."""
        numbers = range(num_rows)
        found = bisect_right(numbers, row, key=lambda number: self.counts(number)[data_set])
        return self.first_row[-1] + found - 1


class Mixture:
    """Deals rows to data sets by weight. One data set gets every row."""

    def __init__(self, weights: Sequence[float], changes: Sequence[Change] = ()) -> None:
        """`changes`, by increasing row above 0, replace the weights. A data set of weight 0 gets no
        row. Shares are rounded to a millionth, but others never to 0.

        Raises ConfigError for a negative or infinite weight, or if all are 0.
        """
        spans = Spans(len(weights))
        for change in (Change(0, tuple(weights)), *changes):
            spans.begin(change)
        self._set(spans)

    @classmethod
    def of_spans(cls, spans: Spans) -> "Mixture":
        """The mixture of spans, of which there is at least one."""
        mixture = cls.__new__(cls)
        mixture._set(spans)
        return mixture

    def _set(self, spans: Spans) -> None:
        self._first_row: Indices = np.array(spans.first_row, dtype=np.int64)
        self._parts: Indices = np.array(spans.parts, dtype=np.int64)
        self._of: Indices = np.array(spans.of, dtype=np.int64)
        self._phase: Indices = np.array(spans.phases, dtype=np.int64)
        self._before: Indices = np.array(spans.before, dtype=np.int64)

    @property
    def is_constant(self) -> bool:
        return len(self._first_row) == 1

    @property
    def shares(self) -> list[float]:
        """Share of the rows that each data set provides at first; they add up to 1."""
        return self.shares_at(0)

    def shares_at(self, row: int) -> list[float]:
        """Shares at a row of the mixture."""
        span = bisect_right(self._first_row.tolist(), row) - 1
        return [int(part) / int(self._of[span, 0]) for part in self._parts[span]]

    def counts(self, num_rows: int) -> list[int]:
        """Number of rows of each data set among the first `num_rows` of the mixture."""
        span = bisect_right(self._first_row.tolist(), num_rows) - 1
        tables = (self._parts[span], self._of[span], self._phase[span])
        dealt = _counts(num_rows - int(self._first_row[span]), *(one.tolist() for one in tables))
        return [int(a) + b for a, b in zip(self._before[span], dealt, strict=True)]

    def deal(self, number: Indices) -> tuple[Indices, Indices]:
        """Data set, and row within it, of each row of the mixture."""
        if self._parts.shape[1] == 1:
            return np.zeros_like(number), number
        span = self._span_of(number)
        # The deal of a span is periodic; within a period the products below do not overflow.
        period, number = np.divmod(number - self._first_row[span], self._of[span, 0])
        data_set, row = self._deal_within_period(span, number)
        row += period * self._parts[span, data_set] + self._before[span, data_set]
        return data_set, row

    def _deal_within_period(self, span: Indices, number: Indices) -> tuple[Indices, Indices]:
        last = self._parts.shape[1] - 1
        data_set = np.full_like(number, last)
        row = number.copy()
        undecided = np.ones(number.shape, dtype=np.bool_)
        for index in range(last):
            given = self._given(span, index, row)
            is_mine = undecided & (self._given(span, index, row + 1) > given)
            data_set[is_mine] = index
            row = np.where(is_mine, given, np.where(undecided, row - given, row))
            undecided &= ~is_mine
        return data_set, row

    def number_of(self, data_set: int, row: Indices) -> Indices:
        """Row of the mixture of each row of a data set: the inverse of `deal`; or NEVER."""
        span = _once_if_equal(np.searchsorted(self._before[:, data_set], row, side="right") - 1)
        parts, of, phase = self._parts[span], self._of[span], self._phase[span]
        part = np.maximum(parts[..., data_set], 1)
        period, number = np.divmod(row - self._before[span, data_set], part)
        number = -((phase[..., data_set] - (number + 1) * of[..., data_set]) // part) - 1
        for index in reversed(range(data_set)):
            others = np.maximum(of[..., index] - parts[..., index], 1)
            number = (number * of[..., index] + phase[..., index]) // others
        number += period * of[..., 0] + self._first_row[span]
        found: Indices = np.where(parts[..., data_set] > 0, number, NEVER)
        return found

    def _span_of(self, number: Indices) -> Indices:
        return _once_if_equal(np.searchsorted(self._first_row, number, side="right") - 1)

    def _given(self, span: Indices, index: int, left: Indices) -> Indices:
        """Number of the first `left` rows after earlier data sets that this data set takes."""
        parts, of, phase = self._parts[span, index], self._of[span, index], self._phase[span, index]
        given: Indices = (left * parts + phase) // np.maximum(of, 1)
        return given


def _once_if_equal(span: Indices) -> Indices:
    """A single span if all are equal, so that the arithmetic has one number instead of an array."""
    first = span.reshape(-1)[:1]
    if not first.size or (span != first).any():
        return span
    return first.reshape(())


def _parts_of(weights: Sequence[float]) -> list[int]:
    # Divided first, as the sum of large weights could be infinite.
    largest = max(weights, default=0.0)
    ratios = [weight / largest for weight in weights] if 0 < largest < inf else []
    total = sum(ratios)
    if not total > 0 or min(ratios) < 0:  # a sum with NaN is NaN
        raise ConfigError(
            f"weights of data sets must be finite, not negative, and not all 0, got {list(weights)}"
        )
    return [max(1, round(ratio / total * _RESOLUTION)) if ratio else 0 for ratio in ratios]


def _phases(parts: list[int], of: list[int], late: list[int]) -> list[int]:
    """Phases from which a span's lines make up for `late` rows, as far as one row per line does."""
    phases = []
    late_of_rest = sum(own for part, own in zip(parts, late, strict=True) if part)
    for part, rest, own in zip(parts, of, late, strict=True):
        if not part:
            phases.append(0)
            continue
        # Half a row is due at first: rounding to the nearest number of rows.
        due = rest // 2 + (rest * own - part * late_of_rest) // _ROW
        phases.append(0 if due < 0 else min(due, rest - 1))
        late_of_rest -= own
    return phases


def _counts(num_rows: int, parts: list[int], of: list[int], phases: list[int]) -> list[int]:
    """Number of rows of each data set among the first rows of a span."""
    periods, left = divmod(num_rows, of[0])
    counts = []
    for part, rest, phase in zip(parts, of, phases, strict=True):
        given = (left * part + phase) // rest if part else 0
        counts.append(periods * part + given)
        left -= given
    return counts
