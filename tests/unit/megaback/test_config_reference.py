"""Keys of the config, with the docstrings of its fields."""

import pytest

from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.config_reference import config_parts, matching_parts


def test_every_key_has_values_and_a_description() -> None:
    parts = config_parts()
    keys = [one for part in parts for one in part.keys]

    assert {part.name for part in parts} | {one.key for one in parts[0].keys} == {
        "",
        *Config.model_fields,
    }
    assert all(one.values and one.description for one in keys)
    assert len({one.key for one in keys}) == len(keys)


def test_a_key_a_section_or_all() -> None:
    (part,) = matching_parts("training.precision")
    (one,) = part.keys
    assert [value.text for value in one.values] == ["bf16", "fp32"]
    assert one.default == "bf16"
    assert "fp32 master weights" in one.description
    assert matching_parts("training") == [one for one in config_parts() if one.name == "training"]
    assert matching_parts(None) == config_parts()


def test_lists_are_shown_as_yaml_has_them() -> None:
    shown = {one.key: one for part in config_parts() for one in part.keys}
    assert {key for key, one in shown.items() if one.is_list} == {
        "finetune.lora.target_modules",
        "keep",
        "optimizer.decay_at",
        "validation.samples",
        "validation.suites",
    }
    assert shown["keep"].default == "[weights, optimizer, schedule, data]"
    assert shown["validation.samples"].default == "[]"


@pytest.mark.parametrize(
    ("key", "advice"),
    [
        ("learning_rate", "did you mean optimizer.learning_rate?"),
        ("optimizer.learning_rat", "did you mean optimizer.learning_rate"),
        ("optimiser", "did you mean optimizer?"),
        ("zero.lr", "the keys of zero are zero.stage, "),
        ("qqq", "the sections are data, "),
    ],
)
def test_a_wrong_key_is_refused_with_the_closest(key: str, advice: str) -> None:
    with pytest.raises(ConfigError) as raised:
        matching_parts(key)
    assert f"there is no key {key}; {advice}" in str(raised.value)
