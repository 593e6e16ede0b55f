"""Ranges of numbers, each declared once, for options, configs, requests and records.

Ranges exclude NaN and infinity and are bounded on both sides, by the limits of storage if there are
no others. An option has `type=SECONDS.option`, a pydantic field `Annotated[float, SECONDS]`;
elsewhere `SECONDS.problem(value)` returns the error.
"""

import json
import math
import numbers
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import annotated_types
import click

from data_pipeline.common.limits import MAX_DICTIONARY_BYTES, MAX_FRAME_TOKENS, MAX_VOCABULARY

INT64_MAX = (1 << 63) - 1
FP32_MAX = float.fromhex("0x1.fffffep+127")
_FP32_MIN_NORMAL = float.fromhex("0x1p-126")
"""Minimum normal number: subnormal numbers have fewer digits, and devices may flush them to 0."""
_MAX_SHOWN_CHARACTERS = 40
_MIN_OMITTED_MAX = 1 << 20
"""Smallest maximum that `described` omits."""


@dataclass(frozen=True)
class Range(annotated_types.GroupedMetadata):
    """Numbers from `min` to `max`; either end may be excluded."""

    min: float
    max: float
    is_whole: bool = False
    excludes_min: bool = False
    excludes_max: bool = False

    def __iter__(self) -> Iterator[annotated_types.BaseMetadata]:
        """Constraints for pydantic."""
        if self.excludes_min:
            yield annotated_types.Gt(self.min)
        else:
            yield annotated_types.Ge(self.min)
        if self.excludes_max:
            yield annotated_types.Lt(self.max)
        else:
            yield annotated_types.Le(self.max)

    @cached_property
    def option(self) -> "click.IntRange | click.FloatRange":
        """Type of a click option."""
        return _Whole(self) if self.is_whole else _Real(self)

    def problem(self, value: float) -> str | None:
        """The error of a number, to follow `it is`; None for a valid one."""
        number: type[Any] = numbers.Real  # also numpy's
        if not isinstance(value, number):
            return "not a number"
        if not math.isfinite(value):
            return "not a finite number"
        if self.is_whole and value % 1:
            return "not a whole number"
        above = value > self.min if self.excludes_min else value >= self.min
        below = value < self.max if self.excludes_max else value <= self.max
        return None if above and below else f"not in the range {self.described(value)}"

    def described(self, value: float = 0) -> str:
        """`0<x<=1`; a maximum that no user nears is included only if `value` exceeds it."""
        low = f"{_shown(self.min)}{'<' if self.excludes_min else '<='}x"
        high = f"{'<' if self.excludes_max else '<='}{_shown(self.max)}"
        if self.max < _MIN_OMITTED_MAX or value > self.max:
            return low + high
        if self.min == -FP32_MAX:
            return "x" if value >= self.min else f"x>={_shown(self.min)}"
        if self.min == _FP32_MIN_NORMAL and value <= 0:
            return "x>0"
        return f"x{'>' if self.excludes_min else '>='}{_shown(self.min)}"


def _shown(end: float) -> str:
    return f"{end:.8g}" if isinstance(end, float) else str(end)


class _Whole(click.IntRange):
    def __init__(self, allowed: Range) -> None:
        super().__init__(min=int(allowed.min), max=int(allowed.max))
        self.allowed = allowed

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = int(click.INT.convert(value, param, ctx))
        if (problem := self.allowed.problem(number)) is not None:
            self.fail(f"{str(number)[:_MAX_SHOWN_CHARACTERS]} is {problem}.", param, ctx)
        return number

    def _describe_range(self) -> str:
        return self.allowed.described()


class _Real(click.FloatRange):
    def __init__(self, allowed: Range) -> None:
        super().__init__(min=allowed.min, max=allowed.max)
        self.allowed = allowed

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = float(click.FLOAT.convert(value, param, ctx))
        if (problem := self.allowed.problem(number)) is not None:
            self.fail(f"{number} is {problem}.", param, ctx)
        return number

    def _describe_range(self) -> str:
        shown = self.allowed.described()
        return "" if shown == "x" else shown


def finite_json(text: str | bytes) -> Any:
    """`json.loads` without NaN and infinity, which are not JSON. Raises ValueError."""
    try:
        return json.loads(text, parse_constant=_not_json, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _not_json(constant: str) -> Any:
    raise ValueError(f"{constant} is not a JSON number")


def _finite(digits: str) -> float:
    number = float(digits)
    if not math.isfinite(number):
        raise ValueError(f"{digits[:_MAX_SHOWN_CHARACTERS]} is not a finite number")
    return number


def _whole(minimum: int, maximum: int = INT64_MAX) -> Range:
    return Range(minimum, maximum, is_whole=True)


NUMBER = Range(-FP32_MAX, FP32_MAX)
NOT_NEGATIVE = Range(0.0, FP32_MAX)
POSITIVE = Range(_FP32_MIN_NORMAL, FP32_MAX)
"""Positive normal fp32 numbers."""
POSITION = Range(0.0, 1e18)
"""Positions of training: fractions of it, or tokens."""
SHARE = Range(0.0, 1.0)
SOME_SHARE = Range(0.0, 1.0, excludes_min=True)
SHARE_BELOW_ALL = Range(0.0, 1.0, excludes_max=True)
PART = Range(1e-6, 1 - 1e-6)
"""Shares of which something is left on either side."""
QUANTITY = Range(0.0, 1e18, excludes_min=True)
"""Gigabytes, FLOP/s, planned tokens: small enough that products stay finite."""
PLANNED_TOKENS = Range(1.0, 1e18)
TRAINING_FLOPS = Range(1.0, 1e32)
EPOCHS = Range(0.0, 1e6, excludes_min=True)
SECONDS = Range(0.0, 1e9, excludes_min=True)
"""Up to 30 years, which timers of every system support."""
WATCH_SECONDS = Range(0.1, 1e6)
SHUTDOWN_SECONDS = Range(1.0, 1e6)
SOURCE_WEIGHT = Range(0.0, 1000.0, excludes_min=True)
RATIO_ABOVE_ONE = Range(1.0, FP32_MAX, excludes_min=True)

TEMPERATURE = Range(0.0, 100.0)
REPETITION_PENALTY = Range(0.01, 100.0)
LOGIT_BIAS = Range(-100.0, 100.0)
TOP_K = _whole(0, 1_000_000)
TOP_K_OR_ALL = _whole(-1, 1_000_000)
"""Values of top_k as in vLLM: -1 and 0 mean all."""
TOKEN_ID = _whole(0, (1 << 32) - 1)
SEED = _whole(0, (1 << 53) - 1)
"""Integers that JavaScript represents exactly; the next sample has the next seed."""
TRAINING_SEED = _whole(0, (1 << 32) - 1)

COUNT = _whole(1)
COUNT_OR_ZERO = _whole(0)
SIZE = _whole(1, (1 << 31) - 1)
"""Size of a tensor in one dimension."""
LAYERS = _whole(1, 4096)
"""Layers of a model: each takes time before memory is checked."""
CONTEXT = _whole(2, 1 << 24)
SAMPLE_TOKENS = _whole(1, 4096)
"""Tokens of a sample that is kept as one line of a record, which has at most 1 MiB."""
"""Tokens of a row; a frame has one or more rows."""
FEW = _whole(1, 1000)
"""Samples, candidates: each takes memory while it is generated."""
MANY = _whole(1, 1 << 20)
"""Processes, threads, tasks, nodes, ranks."""
MANY_OR_ZERO = _whole(0, 1 << 20)
PORT = _whole(0, 65_535)
SLOTS = _whole(1, 1024)
BODY_BYTES = _whole(1024, 1 << 40)
RECORD_BYTES = _whole(1024, 1 << 40)
LEVEL = _whole(1, 22)
DICTIONARY_BYTES = _whole(1024, MAX_DICTIONARY_BYTES)
FRAME_TOKENS = _whole(64, MAX_FRAME_TOKENS)
ROW_TOKENS = _whole(8, MAX_FRAME_TOKENS)
MAX_EPOCH = _whole(0, 10_000)
TWO_OR_MORE = _whole(2)
EXIT_CODE = _whole(-255, 255)
VOCABULARY = _whole(1, MAX_VOCABULARY)
"""Vocabulary sizes of data sets and tokenizers: see `limits`."""
