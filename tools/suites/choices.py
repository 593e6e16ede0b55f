"""Suites of published benchmarks: the choice of an answer, in either direction."""

import math
from functools import partial

from megaback.inference.device_pool import DevicePool
from megaback.scoring.bootstrap import Interval, mean_interval
from megaback.scoring.choices import (
    ChoiceEncoder,
    ChoiceScore,
    Scoring,
    pool_likelihoods,
    score_choices,
)
from megaback.suites.accuracy import (
    ACCURACY,
    BITS_PER_BYTE,
    Metric,
    ScoredRows,
    accuracies,
    bits_per_byte,
    chance_of,
    encode_rows,
    scored_rows,
)
from megaback.suites.data import read_benchmark
from megaback.suites.rows import BENCHMARKS
from tools.suites.base import Evaluated, Suite, SuiteOptions, SuiteResult


def benchmark_suite(name: str) -> Suite:
    """The suite of a benchmark in `BENCHMARKS`."""
    return partial(_evaluate, name)


def _evaluate(
    name: str, evaluated: Evaluated, _: Evaluated | None, options: SuiteOptions
) -> SuiteResult:
    benchmark = BENCHMARKS[name]
    read = read_benchmark(name, benchmark, options.benchmarks, options.limit)
    encoder = ChoiceEncoder(evaluated.codec, evaluated.description.context_tokens)
    rows = encode_rows(name, read.rows, encoder)
    pool = DevicePool(
        evaluated.folder, [evaluated.device], evaluated.weights_dtype, evaluated.model
    )
    scores = score_choices(
        [one for encoded in rows.values() for one in encoded],
        pool_likelihoods(pool),
        with_given=encoder.is_backward or benchmark.is_text,
        with_prior=encoder.is_backward and not benchmark.is_text,
    )
    scored = scored_rows(read.rows, rows, scores)
    facts = {
        "task": benchmark.task,
        "split": read.split,
        "source": read.source,
        "truncated": sum(any(one.num_cut for one in encoded) for encoded in rows.values()),
    }
    num_excluded = len(read.rows) - len(rows)
    if benchmark.is_text:
        metrics = _text_metrics(scored, encoder.is_backward, options.seed)
        return SuiteResult(len(rows), metrics, num_excluded, facts=facts)
    scorings = [*Scoring] if encoder.is_backward else None
    values = accuracies(scored, scorings, has_normalized=benchmark.has_normalized)
    chance = chance_of(scored)
    predictions = [
        {"row": number, "label": row.label, "scores": [_fields(one) for one in group]}
        for number, (row, group) in zip(rows, scored, strict=True)
    ]
    shown = (options.scoring,) if encoder.is_backward else (*values,)
    return SuiteResult(
        len(rows),
        {key: Metric.mean(one, options.seed, chance) for key, one in values.items()},
        num_excluded,
        predictions,
        facts=facts,
        shown=shown,
        paired=dict(zip(rows, values[shown[0]], strict=True)),
    )


def _text_metrics(scored: ScoredRows, is_backward: bool, seed: int) -> dict[str, Metric]:
    """Bits per byte; and of a forward model whether it writes the last word, and the perplexity of
    that."""
    bits = {BITS_PER_BYTE: bits_per_byte(scored, seed)}
    if is_backward:
        return bits
    scores = [one for _, (one,) in scored]
    loss = mean_interval([-one.log_probability for one in scores], seed)
    is_greedy = mean_interval([float(one.is_greedy) for one in scores], seed)
    return {
        ACCURACY: Metric(is_greedy, len(scores)),
        "perplexity": Metric(_exponential(loss), len(scores)),
        **bits,
    }


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
