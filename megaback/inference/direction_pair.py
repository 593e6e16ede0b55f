"""Pairs of a forward and a backward model that predict the same tokens."""

from dataclasses import replace

from data_pipeline.errors import DirectionMismatchError
from data_pipeline.text.codec import Direction, TextFormat, Unit


def require_pair(forward: TextFormat, backward: TextFormat) -> None:
    """Raises DirectionMismatchError or TokenizerMismatchError unless the formats differ in
    direction only, and are of unit `token`. Either may be of a model of both directions."""
    for actual, direction in ((forward, Direction.FORWARD), (backward, Direction.BACKWARD)):
        if actual.direction is not direction:
            raise DirectionMismatchError(
                f"the {direction.value} model writes {actual.direction.value}; give one model "
                "of each direction"
            )
        if actual.unit is not Unit.TOKEN:
            raise DirectionMismatchError(
                f"the {direction.value} model has unit {actual.unit.value!r}; give two models "
                f"of unit {Unit.TOKEN.value!r}, whose tokens are the same"
            )
    turned = replace(backward, direction=Direction.FORWARD, both=forward.both)
    forward.require_same(turned, "the forward model", "the backward model")
