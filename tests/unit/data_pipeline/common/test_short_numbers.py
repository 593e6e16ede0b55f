"""Numbers with a suffix."""

import pytest

from data_pipeline.common.short_numbers import short_number, shown_short


@pytest.mark.parametrize(
    ("text", "number"), [("124M", 124e6), ("1.5b", 1.5e9), ("7e9", 7e9), ("300", 300), ("2T", 2e12)]
)
def test_a_number_is_read_and_shown(text: str, number: float) -> None:
    assert short_number(text) == number
    assert short_number(shown_short(number)) == number


@pytest.mark.parametrize("text", ["", "M", "1,000", "-5", "1MM", "nan"])
def test_other_text_is_none(text: str) -> None:
    assert short_number(text) is None
