"""Accuracies on benchmarks from the scores of their choices, with intervals and chance.

Ties go to the first choice, as in lm_eval. Rows with an answer that does not fit the model's
context are excluded.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipeline.errors import PromptError, SourceEmptyError
from megaback.scoring.bootstrap import Interval, mean_interval, ratio_interval
from megaback.scoring.choices import ChoiceEncoder, ChoiceScore, EncodedChoice, Scoring
from megaback.suites.rows import Benchmark, ChoiceRow

ACCURACY, NORMALIZED_ACCURACY, BITS_PER_BYTE = "acc", "acc_norm", "bits/byte"

ScoredRows = Sequence[tuple[ChoiceRow, Sequence[ChoiceScore]]]
"""Rows, each with the scores of its choices."""


@dataclass(frozen=True)
class Metric:
    """A measured value with its interval, the number of rows, and the value of chance."""

    interval: Interval
    rows: int
    chance: float | None = None

    @classmethod
    def mean(cls, values: Sequence[float], seed: int, chance: float) -> "Metric":
        """Mean of one value per row."""
        return cls(mean_interval(values, seed), len(values), chance)

    def to_dict(self) -> dict[str, float | None]:
        fields: dict[str, float | None] = {**self.interval.to_dict(), "rows": self.rows}
        return fields if self.chance is None else {**fields, "chance": round(self.chance, 6)}


def encode_rows(
    name: str, rows: Sequence[ChoiceRow], encoder: ChoiceEncoder
) -> dict[int, list[EncodedChoice]]:
    """Encoded choices by number of the row; rows that do not fit are absent.

    Raises SourceEmptyError if none does.
    """
    encoded: dict[int, list[EncodedChoice]] = {}
    for number, row in enumerate(rows):
        try:
            encoded[number] = encoder.encode_all(row.choices)
        except PromptError:
            continue
    if not encoded:
        raise SourceEmptyError(
            f"no row of {name} fits the model's context of {encoder.context_tokens} tokens"
        )
    return encoded


def scored_rows(
    rows: Sequence[ChoiceRow],
    encoded: Mapping[int, Sequence[EncodedChoice]],
    scores: Sequence[ChoiceScore],
) -> ScoredRows:
    """Rows with the scores of their choices, which are given in the order of `encoded`."""
    remaining = iter(scores)
    return [(rows[number], [next(remaining) for _ in group]) for number, group in encoded.items()]


def needs_given(benchmark: Benchmark, scorings: Sequence[Scoring] | None) -> bool:
    """Whether `accuracies` or `bits_per_byte` needs log P(given)."""
    return benchmark.is_text or any(one.needs_answer for one in scorings or ())


def accuracies(
    scored: ScoredRows, scorings: Sequence[Scoring] | None, *, has_normalized: bool
) -> dict[str, list[float]]:
    """Whether the best answer of each row is the correct one, by each score.

    `scorings`: of a backward model, None for a forward one. As lm_eval does, `acc_norm` divides by
    characters.
    """
    if scorings is not None:
        return {
            scoring.value: [
                _is_right(row, [one.value(scoring) for one in group]) for row, group in scored
            ]
            for scoring in scorings
        }
    plain = [(row, [one.log_probability for one in group]) for row, group in scored]
    found = {ACCURACY: [_is_right(row, values) for row, values in plain]}
    if has_normalized:
        found[NORMALIZED_ACCURACY] = [
            _is_right(row, [v / max(len(t), 1) for v, t in zip(values, row.texts, strict=True)])
            for row, values in plain
        ]
    return found


def chance_of(scored: ScoredRows) -> float:
    """Accuracy of a random choice."""
    return sum(1 / len(row.choices) for row, _ in scored) / len(scored)


def bits_per_byte(scored: ScoredRows, seed: int) -> Metric:
    """Bits per byte of whole texts, the same quantity in both directions."""
    scores = [one for _, (one,) in scored]
    texts = [row.choices[0].context + row.choices[0].continuation for row, _ in scored]
    nats = [-(one.log_probability + (one.given_log_probability or 0.0)) for one in scores]
    bits = ratio_interval(nats, [len(text.encode()) for text in texts], seed)
    return Metric(bits.scaled(1 / math.log(2)), len(scores))


def _is_right(row: ChoiceRow, values: Sequence[float]) -> float:
    """1 if the best answer is the correct one; scores of a diverged model have no best one."""
    return float(not np.isnan(values).any() and int(np.argmax(values)) == row.label)
