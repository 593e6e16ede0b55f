"""Numbers with a suffix, as sizes of models and data sets are written: `300k`, `1.5M`, `7B`."""

import re

import click

from data_pipeline.common.number_ranges import Range

_SHORT = re.compile(r"(\d+(?:\.\d+)?(?:[eE][-+]?\d{1,2})?)([kKmMbBtT]?)")
_FACTORS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "t": 10**12}


def short_number(text: str) -> float | None:
    """The number; None for any other text."""
    found = _SHORT.fullmatch(text.strip())
    return float(found[1]) * _FACTORS[found[2].lower()] if found else None


def shown_short(number: float) -> str:
    """A number as `short_number` reads it."""
    suffix = next((one for one in "TBMk" if number >= _FACTORS[one.lower()]), "")
    return f"{number / _FACTORS[suffix.lower()]:g}{suffix}"


class ShortNumber(click.ParamType[float]):
    """Type of an option: a number within a range, such as 124M."""

    name = "number"

    def __init__(self, allowed: Range) -> None:
        self.allowed = allowed

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = short_number(str(value))
        if number is None:
            self.fail(f"{value!r} is not a number such as 800k, 124M or 1e9.", param, ctx)
        if (problem := self.allowed.problem(number)) is not None:
            self.fail(f"{value} is {problem}.", param, ctx)
        return number
