"""YAML as configs have it: a key that is there twice is an error, where PyYAML keeps the last."""

from typing import Any

import yaml

from data_pipeline.errors import ConfigError

_MERGE_TAG = "tag:yaml.org,2002:merge"


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with this difference."""

    def compose_mapping_node(self, anchor: Any) -> Any:
        node = super().compose_mapping_node(anchor)
        lines: dict[str, int] = {}
        for key_node, _ in node.value:
            if key_node.tag == _MERGE_TAG or not isinstance(key_node, yaml.ScalarNode):
                continue
            key, line = key_node.value, key_node.start_mark.line + 1
            if key in lines:
                raise yaml.YAMLError(
                    f"the key {key} is there twice, on line {lines[key]} and on line {line}"
                )
            lines[key] = line
        return node


def read_yaml(text: str) -> Any:
    """What a text means. Raises yaml.YAMLError, for a key that is there twice too."""
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader's subclass)
    except RecursionError:
        raise yaml.YAMLError("it is nested too deeply") from None


def apply_override(fields: dict[str, Any], override: str) -> None:
    """Set the key of a `key.sub=value`. Raises ConfigError."""
    key, separator, text = override.partition("=")
    if not separator or not key:
        raise ConfigError(f"{override!r} is not an override; write key.sub=value")
    try:
        value = read_yaml(text)
    except yaml.YAMLError:
        raise ConfigError(f"the value of the override {override!r} is not valid YAML") from None
    *parents, last = key.split(".")
    section = fields
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"the override {override!r} looks into {parent}, which has no keys")
    section[last] = value
