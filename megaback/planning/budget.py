"""Size and length of a run within a budget: parameters, model FLOPs, or seconds. Loads no torch."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache

from data_pipeline.errors import ConfigError
from megaback.config import ModelSection
from megaback.planning import scaling_rules as rules
from megaback.planning.data_summary import DataSummary
from megaback.planning.flops import ModelSize, flops_per_token

_FIXED_POINT_ROUNDS = 30
_DEPTH_RANGE = 0.25
_MAX_SIZE_ERROR = 0.15
_ASPECT_WEIGHT = 0.1
_MIN_TOKENS_SHARE = 0.25
"""Share of the usual tokens per parameter below which no model is chosen for lack of text."""
_MAX_VALIDATION_SHARE = 0.1
_MEASUREMENTS = 5
"""Measurements of the val set: at the start, after each quarter, and at the end."""


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Limits of a run: parameters, FLOPs or time, or parameters with one of the others."""

    parameters: float | None = None
    """All parameters of the model, as published sizes are counted."""
    flops: float | None = None
    """Model FLOPs of training."""
    seconds: float | None = None
    sustained_flops: float | None = None
    """FLOP/s of all devices together while training; for `seconds`."""

    @property
    def machine_flops(self) -> float | None:
        """FLOPs within `seconds`."""
        if self.seconds is None or self.sustained_flops is None:
            return None
        return self.seconds * self.sustained_flops

    def at_rate(self, sustained_flops: float) -> "Budget":
        return replace(self, sustained_flops=sustained_flops)


@dataclass(frozen=True, kw_only=True)
class SizedRun:
    """A model and the tokens that it is trained on."""

    shape: ModelSection
    parameters: int
    """Parameters that multiply a token."""
    context_tokens: int
    tokens: float
    ladder_batch_tokens: float
    """Tokens per step by OLMo-core's ladder."""
    batch_tokens: float
    """Tokens per step by all rules, before rounding to rows."""
    is_capped: bool
    """Whether the data set limits `tokens`."""
    measures_during_training: bool
    """Whether the val set is small enough to be measured during training."""

    @property
    def tokens_per_parameter(self) -> float:
        return self.tokens / self.parameters


def sized_run(budget: Budget, data: DataSummary) -> SizedRun:
    """Choose a model and its tokens. Raises ConfigError if the budget suffices for none."""
    if budget.parameters is not None:
        return _run_of(_shape_with(budget.parameters, data.vocab_size), budget, data)
    best: SizedRun | None = None
    for shape in _ladder(data.vocab_size):
        run = _run_of(shape, budget, data)
        if best is None or _distance(run) < _distance(best):
            best = run
        if run.tokens_per_parameter < _MIN_TOKENS_SHARE * rules.TOKENS_PER_PARAMETER:
            break  # larger ones have fewer
    assert best is not None
    return best


def _distance(run: SizedRun) -> tuple[bool, float]:
    """Order of runs by how well they use a budget; smaller is better.

    A model whose tokens the data set limits would leave a part of the budget unused, so that a
    larger one is better, until it has too little text.
    """
    ratio = run.tokens_per_parameter / rules.TOKENS_PER_PARAMETER
    if run.is_capped and ratio >= _MIN_TOKENS_SHARE:
        return False, 10.0 + math.log(ratio)
    return ratio < _MIN_TOKENS_SHARE, abs(math.log(ratio))


def _ladder(vocab_size: int) -> Iterator[ModelSection]:
    """One model per width, from the smallest."""
    for width in rules.widths():
        depth = max(round(rules.usual_depth(width)), 1)
        yield rules.shape_of(width, depth, vocab_size)


def _shape_with(parameters: float, vocab_size: int) -> ModelSection:
    """The model of a total size, within 15%, whose depth is near the usual one.

    Raises ConfigError.
    """
    found: list[tuple[float, ModelSection]] = []
    sizes = []
    for width in rules.widths():
        usual = rules.usual_depth(width)
        low, high = usual * (1 - _DEPTH_RANGE), usual * (1 + _DEPTH_RANGE)
        for depth in range(max(math.floor(low), 1), max(math.ceil(high), 1) + 1):
            shape = rules.shape_of(width, depth, vocab_size)
            total = ModelSize.of(shape, vocab_size).total
            sizes.append(total)
            error = abs(math.log(total / parameters))
            if error <= _MAX_SIZE_ERROR:
                found.append((error + _ASPECT_WEIGHT * abs(math.log(depth / usual)), shape))
    if not found:
        if parameters < min(sizes):
            raise ConfigError(
                f"`parameters` is {parameters:,.0f}, but with a vocabulary of {vocab_size:,} the "
                f"smallest model has {min(sizes):,}; give at least that, or build shards with a "
                "smaller vocabulary"
            )
        if parameters > max(sizes):
            raise ConfigError(
                f"`parameters` is {parameters:,.0f}, more than the rules are known for; give at "
                f"most {max(sizes):,}"
            )
        near = sorted(sizes, key=lambda size: abs(math.log(size / parameters)))[0]
        raise ConfigError(
            f"no model of {parameters:,.0f} parameters has a usual shape with a vocabulary of "
            f"{vocab_size:,}; the nearest has {near:,}"
        )
    return min(found, key=lambda pair: pair[0])[1]


def _run_of(shape: ModelSection, budget: Budget, data: DataSummary) -> SizedRun:
    """The run of a model: as many tokens as the budget or the rule gives, up to the cap."""
    parameters = rules.scaling_parameters(shape, data.vocab_size)
    context = _context(parameters, data)
    flops = flops_per_token(shape, data.vocab_size, _attended(data, context))
    min_batch_tokens = rules.min_batch_tokens(shape, flops)
    measures = data.val_tokens > 0
    if budget.machine_flops is not None:
        validation = data.val_tokens * flops / 3
        measures &= _MEASUREMENTS * validation <= _MAX_VALIDATION_SHARE * budget.machine_flops
        rest = budget.machine_flops - (_MEASUREMENTS if measures else 2) * validation
        update_flops = rules.muon_flops(shape)
        tokens = _affordable_tokens(max(rest, 0.0), flops, update_flops, min_batch_tokens)
    elif budget.flops is not None:
        tokens = budget.flops / flops
    else:
        tokens = float(rules.TOKENS_PER_PARAMETER * parameters)
    max_tokens = math.inf if data.train_tokens is None else rules.MAX_EPOCHS * data.train_tokens
    used_tokens = max(min(tokens, max_tokens), 1.0)
    ladder_batch_tokens = rules.batch_tokens(used_tokens)
    return SizedRun(
        shape=shape,
        parameters=parameters,
        context_tokens=context,
        tokens=used_tokens,
        ladder_batch_tokens=ladder_batch_tokens,
        batch_tokens=max(ladder_batch_tokens, min_batch_tokens),
        is_capped=tokens > max_tokens,
        measures_during_training=measures,
    )


def _context(parameters: int, data: DataSummary) -> int:
    return data.fitting_context(rules.context_tokens(parameters))


@lru_cache(maxsize=16)
def _attended(data: DataSummary, context_tokens: int) -> float:
    return data.attended_tokens(context_tokens)


def _affordable_tokens(
    flops: float, per_token: float, per_step: float, min_batch_tokens: float
) -> float:
    """Tokens of a run whose steps also cost `per_step`, with the batch for its length."""
    tokens = flops / per_token
    for _ in range(_FIXED_POINT_ROUNDS):
        batch_tokens = max(rules.batch_tokens(max(tokens, 1.0)), min_batch_tokens)
        tokens = flops / (per_token + per_step / batch_tokens)
    return tokens
