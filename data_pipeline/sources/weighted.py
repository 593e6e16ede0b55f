"""Sources with weights, and the option for malformed records."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import click

from data_pipeline.errors import ConfigError
from data_pipeline.redaction import shown_url
from data_pipeline.storage.address_variables import kept

_Function = TypeVar("_Function", bound=Callable[..., Any])

BAD_RECORD_CHOICES = ("stop", "skip")


def on_bad_record_option(default: str) -> Callable[[_Function], _Function]:
    """The option `--on-bad-record`."""
    return click.option(
        "--on-bad-record",
        type=click.Choice(BAD_RECORD_CHOICES),
        default=default,
        show_default=True,
        help="Action on a malformed record: stop, or skip and count it.",
    )


@dataclass(frozen=True)
class WeightedSource:
    """A source and its weight, the number of times that each document is used.

    With 2.5, every document is used twice, and half of them, chosen by their text, a third time.
    """

    source: str
    weight: float = 1.0
    split: str | None = None
    """Set of all its documents; None: by the hash of each text."""

    def __post_init__(self) -> None:
        """Replaces secrets of the address, so that they are never stored."""
        object.__setattr__(self, "source", kept(self.source))

    def __str__(self) -> str:
        """Source and weight, for display."""
        shown = shown_url(self.source)
        return shown if self.weight == 1.0 else f"{self.weight:g} x {shown}"


def weighted_sources(
    sources: tuple[str, ...], weights: tuple[float, ...]
) -> tuple[WeightedSource, ...]:
    """Pair sources with weights. Raises ConfigError when their numbers differ."""
    if weights and len(weights) != len(sources):
        raise ConfigError(
            f"{len(sources)} `source` and {len(weights)} `weight` were given; "
            "give one `weight` for each `source`, in the same order, or none"
        )
    return tuple(
        WeightedSource(source, weight)
        for source, weight in zip(sources, weights or (1.0,) * len(sources), strict=True)
    )
