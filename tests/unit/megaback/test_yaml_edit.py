"""Edits of a config keep everything else, or are refused."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError
from megaback.yaml_edit import with_values
from megaback.yaml_text import read_yaml
from tests.helpers.paths import ROOT

VALUES = {
    "zero.stage": 2,
    "zero.reduce_once": True,
    "training.activation_checkpointing": "none",
    "batch.micro_batch_rows": 16,
}
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


@settings(max_examples=20)
@given(
    path=st.sampled_from(CONFIGS),
    keys=st.sets(st.sampled_from(sorted(VALUES)), min_size=1),
    newline=st.sampled_from(["\n", "\r\n"]),
    ends=st.booleans(),
)
def test_shipped_configs_get_the_values_and_keep_every_other_line(
    path: Path, keys: set[str], newline: str, ends: bool
) -> None:
    text = path.read_text(encoding="utf-8").rstrip("\n") + "\n" * ends
    text = text.replace("\n", newline)
    values = {key: VALUES[key] for key in keys}

    changed = with_values(text, values)

    fields = read_yaml(changed)
    for key, value in values.items():
        section, name = key.split(".")
        assert fields[section][name] == value
    names = {key.split(".")[1] for key in keys}
    assert [line for line in text.splitlines() if line.partition(":")[0].strip() not in names] == [
        line
        for line in changed.splitlines()
        if line.partition(":")[0].strip() not in names
        and (line != "zero:" or "zero:" in text.splitlines())
    ]
    assert with_values(changed, values) == changed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            "base: &all {stage: 1}\nzero:\n  <<: *all\n",
            "base: &all {stage: 1}\nzero:\n  stage: 2\n  reduce_once: true\n  <<: *all\n",
        ),
        ("zero: {stage: 1}  # why\n", "zero: {stage: 2, reduce_once: true}  # why\n"),
        (
            "zero:\n    stage:   1   # why\n",
            "zero:\n    stage:   2   # why\n    reduce_once: true\n",
        ),
        ("zero:\n  stage: '1'", "zero:\n  stage: 2\n  reduce_once: true"),
        ("zero:\n  stage:\n", "zero:\n  stage: 2\n  reduce_once: true\n"),
        ("a: 1", "a: 1\nzero:\n  stage: 2\n  reduce_once: true\n"),
        ("zero:\n  stage: 1\n\n# end\n", "zero:\n  stage: 2\n  reduce_once: true\n\n# end\n"),
    ],
    ids=[
        "merged",
        "flow",
        "indent",
        "no end",
        "empty",
        "section",
        "comment",
    ],
)
def test_layouts_are_kept(text: str, expected: str) -> None:
    assert with_values(text, {"zero.stage": 2, "zero.reduce_once": True}) == expected


@pytest.mark.parametrize(
    "text",
    [
        "base: &all\n  stage: 1\nzero: *all\n",
        "zero:\n",
        "[1]\n",
    ],
    ids=["alias", "empty", "list"],
)
def test_a_layout_in_which_more_would_change_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"set them by hand: zero.stage: 2"):
        with_values(text, {"zero.stage": 2})
