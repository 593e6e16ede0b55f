"""Shards that a trained model cannot be measured on: the message is about the model."""

from dataclasses import replace
from typing import Any

import pytest

from data_pipeline.errors import ConfigError, DirectionMismatchError, MegabackError
from data_pipeline.loading.measured_rows import require_measurable
from data_pipeline.text.codec import Direction, TextFormat, Unit
from tests.helpers.batches import DataSet

BACKWARD = TextFormat(Direction.BACKWARD, Unit.TOKEN, "0" * 64)
FORWARD, BOTH = replace(BACKWARD, direction=Direction.FORWARD), replace(BACKWARD, both=True)
OF_WORDS = replace(BACKWARD, unit=Unit.WORD)
IN_ROWS = {"row_tokens": 16, "text_format": BACKWARD}


@pytest.mark.parametrize(
    ("shards", "model", "context_tokens", "error", "message"),
    [
        ({}, BACKWARD, 24, ConfigError, "M, 24 tokens, does not divide .*--frame-tokens 24"),
        (IN_ROWS, BACKWARD, 8, ConfigError, "rows of 16 tokens.* --context-tokens 8"),
        (IN_ROWS, BOTH, 16, DirectionMismatchError, "M is of both.*; give shards of documents"),
        (
            IN_ROWS,
            FORWARD,
            16,
            DirectionMismatchError,
            "M has direction .forward.*--direction forward",
        ),
        ({"text_format": OF_WORDS}, BOTH, 16, DirectionMismatchError, "both.*--unit token"),
        ({"text_format": OF_WORDS}, FORWARD, 16, DirectionMismatchError, "--unit token"),
    ],
)
def test_the_message_says_which_shards_the_model_needs(
    shards: dict[str, Any],
    model: TextFormat,
    context_tokens: int,
    error: type[MegabackError],
    message: str,
    small: DataSet,
) -> None:
    manifest = replace(small.manifest, **shards)
    with pytest.raises(error, match=message) as raised:
        require_measurable(manifest, "SHARDS", "M", model, context_tokens)
    assert "SHARDS" in str(raised.value)
    assert "data.direction" not in str(raised.value)  # the key of a run, which this is not


@pytest.mark.parametrize(
    ("shards", "model"),
    [
        ({}, BACKWARD),
        ({}, FORWARD),
        ({}, BOTH),
        (IN_ROWS, BACKWARD),
        ({"text_format": OF_WORDS}, OF_WORDS),
    ],
)
def test_shards_that_can_be_read_are_accepted(
    shards: dict[str, Any], model: TextFormat, small: DataSet
) -> None:
    require_measurable(replace(small.manifest, **shards), "SHARDS", "M", model, 16)
