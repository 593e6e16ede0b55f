"""Sources as a command is given them: how often each is taken, and what malformed records do."""

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
    """`--on-bad-record`."""
    return click.option(
        "--on-bad-record",
        type=click.Choice(BAD_RECORD_CHOICES),
        default=default,
        show_default=True,
        help="Action on a malformed record: stop, or skip and count it.",
    )


@dataclass(frozen=True)
class WeightedSource:
    """A source, and how many times each of its documents is taken.

    With 2.5 every document is taken twice, and half of them, chosen by their text, a third time.
    """

    source: str
    weight: float = 1.0
    split: str | None = None
    """The set that all of it belongs to; None: as the hash of each text says."""

    def __post_init__(self) -> None:
        """Whatever a source is written to, no secret of its address gets there."""
        object.__setattr__(self, "source", kept(self.source))

    def __str__(self) -> str:
        """The source as it is shown."""
        shown = shown_url(self.source)
        return shown if self.weight == 1.0 else f"{self.weight:g} x {shown}"


def weighted_sources(
    sources: tuple[str, ...], weights: tuple[float, ...]
) -> tuple[WeightedSource, ...]:
    """Sources with their weights, in the order given. Raises ConfigError when they do not pair."""
    if weights and len(weights) != len(sources):
        raise ConfigError(
            f"{len(sources)} `source` and {len(weights)} `weight` were given; "
            "give one `weight` for each `source`, in the same order, or none"
        )
    return tuple(
        WeightedSource(source, weight)
        for source, weight in zip(sources, weights or (1.0,) * len(sources), strict=True)
    )
