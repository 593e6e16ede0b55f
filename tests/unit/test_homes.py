"""Code with one home is not written elsewhere: file locks, temporary names, the figures extra."""

import pytest

from tests.helpers.product import MODULES


@pytest.mark.parametrize(
    ("words", "home"),
    [
        ("flock(", "data_pipeline.common.locks"),
        (".hex[:12]", "data_pipeline.common.atomic"),
        ("megaback[plot]", "data_pipeline.common.figures"),
    ],
)
def test_words_appear_in_one_module(words: str, home: str) -> None:
    holding = [
        module for module, path in MODULES.items() if words in path.read_text(encoding="utf-8")
    ]
    assert holding == [home]
