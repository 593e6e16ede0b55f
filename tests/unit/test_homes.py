"""What has a home is written nowhere else: locks of files, hidden names, the extra for figures."""

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("data_pipeline", "megaback", "launcher", "tools")


@pytest.mark.parametrize(
    ("words", "home"),
    [
        ("flock(", "data_pipeline.common.locks"),
        (".hex[:12]}.partial", "data_pipeline.common.atomic"),
        ("megaback[plot]", "data_pipeline.common.figures"),
    ],
)
def test_words_stand_in_one_module(words: str, home: str) -> None:
    holding = [
        ".".join(path.relative_to(ROOT).with_suffix("").parts)
        for package in PACKAGES
        for path in sorted((ROOT / package).rglob("*.py"))
        if words in path.read_text(encoding="utf-8")
    ]
    assert holding == [home]
