"""Suites of published benchmarks: the choice of an answer, in either direction."""

import math
from collections.abc import Sequence
from functools import partial

import numpy as np

from data_pipeline.errors import PromptError, SourceEmptyError
from megaback.inference.device_pool import DevicePool
from megaback.scoring.bootstrap import Interval, mean_interval, ratio_interval
from megaback.scoring.choices import (
    ChoiceEncoder,
    ChoiceScore,
    EncodedChoice,
    Scoring,
    pool_likelihoods,
    score_choices,
)
from tools.suites.base import Evaluated, Metric, Suite, SuiteOptions, SuiteResult
from tools.suites.choice_data import read_benchmark
from tools.suites.choice_rows import BENCHMARKS, ChoiceRow

ACCURACY, NORMALIZED_ACCURACY = "acc", "acc_norm"


def benchmark_suite(name: str) -> Suite:
    """The suite of a benchmark in `BENCHMARKS`."""
    return partial(_evaluate, name)


def _evaluate(
    name: str, evaluated: Evaluated, _: Evaluated | None, options: SuiteOptions
) -> SuiteResult:
    benchmark = BENCHMARKS[name]
    read = read_benchmark(name, benchmark, options.benchmarks, options.limit)
    encoder = ChoiceEncoder(evaluated.codec, evaluated.description.context_tokens)
    rows: dict[int, list[EncodedChoice]] = {}
    for number, row in enumerate(read.rows):
        try:
            rows[number] = encoder.encode_all(row.choices)
        except PromptError:  # it is counted
            continue
    if not rows:
        raise SourceEmptyError(
            f"no row of {name} fits the model's context of {encoder.context_tokens} tokens"
        )
    pool = DevicePool(
        evaluated.folder, [evaluated.device], evaluated.weights_dtype, evaluated.model
    )
    is_text = benchmark.num_choices == 1
    scores = score_choices(
        [one for encoded in rows.values() for one in encoded],
        pool_likelihoods(pool),
        with_given=encoder.is_backward or is_text,
        with_prior=encoder.is_backward and not is_text,
    )
    ends = np.cumsum([len(encoded) for encoded in rows.values()])
    groups = [scores[end - len(one) : end] for end, one in zip(ends, rows.values(), strict=True)]
    scored = [(read.rows[number], group) for number, group in zip(rows, groups, strict=True)]
    facts = {
        "task": benchmark.task,
        "split": read.split,
        "source": read.source,
        "truncated": sum(any(one.num_cut for one in encoded) for encoded in rows.values()),
    }
    if is_text:
        metrics = _text_metrics(scored, encoder.is_backward, options.seed)
        return SuiteResult(len(rows), metrics, len(read.rows) - len(rows), facts=facts)
    values = _values(scored, encoder.is_backward)
    if not benchmark.has_normalized:
        values.pop(NORMALIZED_ACCURACY, None)
    chance = sum(1 / len(row.choices) for row, _ in scored) / len(scored)
    predictions = [
        {"row": number, "label": row.label, "scores": [_fields(one) for one in group]}
        for number, (row, group) in zip(rows, scored, strict=True)
    ]
    shown = (options.scoring,) if encoder.is_backward else (*values,)
    return SuiteResult(
        len(rows),
        {key: Metric.mean(one, options.seed, chance) for key, one in values.items()},
        len(read.rows) - len(rows),
        predictions,
        facts=facts,
        shown=shown,
        paired=dict(zip(rows, values[shown[0]], strict=True)),
    )


def _values(
    scored: Sequence[tuple[ChoiceRow, list[ChoiceScore]]], is_backward: bool
) -> dict[str, list[float]]:
    """Whether the best answer of each row is the correct one, by each score; ties go to the first.

    As lm_eval does, `acc_norm` divides by characters.
    """
    if is_backward:
        return {
            scoring.value: [
                _is_right(row, [one.value(scoring) for one in group]) for row, group in scored
            ]
            for scoring in Scoring
        }
    plain = [(row, [one.log_probability for one in group]) for row, group in scored]
    return {
        ACCURACY: [_is_right(row, values) for row, values in plain],
        NORMALIZED_ACCURACY: [
            _is_right(row, [v / max(len(t), 1) for v, t in zip(values, row.texts, strict=True)])
            for row, values in plain
        ],
    }


def _is_right(row: ChoiceRow, values: Sequence[float]) -> float:
    return float(int(np.argmax(values)) == row.label)


def _text_metrics(
    scored: Sequence[tuple[ChoiceRow, list[ChoiceScore]]], is_backward: bool, seed: int
) -> dict[str, Metric]:
    """Bits per byte of whole texts, the same quantity in both directions; and of a forward model
    whether it writes the last word, and the perplexity of that."""
    scores = [one for _, (one,) in scored]
    texts = [row.choices[0].context + row.choices[0].continuation for row, _ in scored]
    nats = [-(one.log_probability + (one.given_log_probability or 0.0)) for one in scores]
    bits = ratio_interval(nats, [len(text.encode()) for text in texts], seed)
    metrics = {"bits/byte": Metric(bits.scaled(1 / math.log(2)), len(scores))}
    if not is_backward:
        loss = mean_interval([-one.log_probability for one in scores], seed)
        metrics = {
            ACCURACY: Metric(
                mean_interval([float(one.is_greedy) for one in scores], seed), len(scores)
            ),
            "perplexity": Metric(_exponential(loss), len(scores)),
            **metrics,
        }
    return metrics


def _exponential(one: Interval) -> Interval:
    low, high = (None if bound is None else math.exp(bound) for bound in (one.low, one.high))
    return Interval(math.exp(one.value), low, high)


def _fields(one: ChoiceScore) -> dict[str, float | int]:
    fields: dict[str, float | int | None] = {
        "log_probability": round(one.log_probability, 5),
        "tokens": one.tokens,
        "given_log_probability": one.given_log_probability,
        "prior_log_probability": one.prior_log_probability,
    }
    return {key: round(value, 5) for key, value in fields.items() if value is not None}
