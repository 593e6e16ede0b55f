"""Axes of a sweep: keys of the config with a list of values each, and their combinations.

`optimizer.learning_rate=1e-3,3e-3` is an axis of two values. A comma within brackets, braces or
quotes belongs to a value, so that YAML lists and quoted text are single values. Loads no torch.
"""

from collections import ChainMap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from data_pipeline.errors import ConfigError

SEED_KEY = "training.seed"

Point = dict[str, str]
"""Value of each axis, as YAML."""


@dataclass(frozen=True)
class Axis:
    """A key and its values, as YAML."""

    key: str
    values: tuple[str, ...]


def axes_of(overrides: Sequence[str]) -> tuple[list[Axis], tuple[str, ...]]:
    """The axes among overrides, and the overrides of all runs. Raises ConfigError."""
    axes: list[Axis] = []
    common = []
    for text in overrides:
        key, _, value = text.partition("=")
        values = tuple(split_values(value))
        if len(values) == 1:
            common.append(text)
            continue
        if "" in values:
            raise ConfigError(f"{text!r} has an empty value; give values between all commas")
        axes.append(Axis(key, values))
    keys = [text.partition("=")[0] for text in common] + [axis.key for axis in axes]
    for axis in axes:
        if axis.key == "run":
            raise ConfigError("every run of a sweep has a folder of its own; give --out FOLDER")
        if keys.count(axis.key) > 1:
            raise ConfigError(f"{axis.key} is given twice; give all of its values in one list")
    return axes, tuple(common)


def split_values(text: str) -> Iterator[str]:
    """The parts of a text between its commas, but for those in brackets, braces and quotes."""
    depth, quote, start = 0, "", 0
    for place, character in enumerate(text):
        before = text[start:place].rstrip()
        if quote:
            quote = "" if character == quote else quote
        elif character in "'\"" and (not before or before[-1] in "[{,:"):  # else an apostrophe
            quote = character
        elif character in "[{":
            depth += 1
        elif character in "]}":
            depth -= 1
        elif character == "," and depth <= 0:
            yield before.strip()
            start = place + 1
    yield text[start:].strip()


def points_of(axes: Sequence[Axis], zipped: Sequence[str]) -> list[Point]:
    """All combinations of values, with the seed outermost: its first value completes a sweep.

    `zipped`: lists of keys, separated by commas, whose values are taken together: the first of
    each, the second of each, and so on. Raises ConfigError.
    """
    groups = [_zipped(text, axes) for text in zipped]
    keys = [axis.key for group in groups for axis in group]
    if twice := [key for key in keys if keys.count(key) > 1]:
        raise ConfigError(f"--zip has {twice[0]} twice; give each key once")
    groups += [[axis] for axis in axes if axis.key not in keys]
    groups.sort(key=lambda group: (group[0].key != SEED_KEY, axes.index(group[0])))
    steps = [
        [
            dict(zip([axis.key for axis in group], values, strict=True))
            for values in zip(*(axis.values for axis in group), strict=True)
        ]
        for group in groups
    ]
    merged = [dict(ChainMap(*combination)) for combination in product(*steps)]
    return [{axis.key: point[axis.key] for axis in axes} for point in merged]


def overrides_of(point: Point) -> tuple[str, ...]:
    """The overrides of a config that set a point's values."""
    return tuple(f"{key}={text}" for key, text in point.items())


def _zipped(text: str, axes: Sequence[Axis]) -> list[Axis]:
    known = {axis.key: axis for axis in axes}
    keys = [key.strip() for key in text.split(",")]
    if absent := [key for key in keys if key not in known]:
        raise ConfigError(f"--zip {text}: give {absent[0] or 'KEY'}=VALUE,VALUE, a list of values")
    group = [known[key] for key in keys]
    counts = [f"{axis.key} has {len(axis.values)}" for axis in group]
    if len(group) < 2 or len({len(axis.values) for axis in group}) > 1:
        raise ConfigError(
            f"--zip takes two or more keys with equally many values, and {', '.join(counts)}"
        )
    return group
