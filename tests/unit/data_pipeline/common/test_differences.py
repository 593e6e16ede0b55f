"""Differences between nested mappings."""

import pytest

from data_pipeline.common.differences import differing_keys, shown_values

ONE = {
    "model": {"width": 32, "num_layers": 2, "num_heads": 4},
    "sources": [{"path": "a", "weight": 1.0}, {"path": "b", "weight": 2.0}],
    "languages": ["en", "de"],
    "seed": 3,
}


@pytest.mark.parametrize(
    ("other", "keys", "mine", "theirs"),
    [
        (ONE, None, "", ""),
        (ONE | {"seed": 4}, ["model", "languages"], "", ""),
        (ONE | {"seed": 4}, ["seed"], "seed = 3", "seed = 4"),
        (
            ONE | {"model": {"width": 64, "num_layers": 2, "num_heads": 8}},
            ["model"],
            "model.width = 32, model.num_heads = 4",
            "model.width = 64, model.num_heads = 8",
        ),
        (ONE | {"model": None}, ["model.width"], "model.width = 32", "model.width = null"),
        (
            ONE | {"sources": [ONE["sources"][0], {"path": "b", "weight": 3.0}]},
            None,
            "sources[1].weight = 2.0",
            "sources[1].weight = 3.0",
        ),
        (ONE | {"languages": ["en"]}, None, "languages = en, de", "languages = en"),
        (ONE | {"languages": []}, None, "languages = en, de", "languages = none"),
        (
            ONE | {"sources": ONE["sources"][:1]},  # type: ignore[index]
            None,
            "sources = {'path': 'b', 'weight': 2.0}",
            "sources = none",
        ),
        (ONE | {"languages": None}, None, "languages = en, de", "languages = null"),
        (ONE | {"more": 1}, None, "more = null", "more = 1"),
    ],
)
def test_only_differences_are_shown(
    other: dict[str, object], keys: list[str] | None, mine: str, theirs: str
) -> None:
    found = differing_keys(ONE, other, keys)

    assert (shown_values(found, 0), shown_values(found, 1)) == (mine, theirs)
