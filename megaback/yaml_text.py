"""YAML as configs have it, of bounded size, since a run's folder may be a stranger's.

A key that is there twice is an error, where PyYAML keeps the last. What aliases and merged keys
stand for is counted before it is made: a few lines of them can stand for billions of values.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.common.next_command import override
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import ConfigError
from data_pipeline.storage.address_variables import kept_in

_MERGE_TAG = "tag:yaml.org,2002:merge"
_MAX_BYTES = 1 << 18
_MAX_VALUES = 20_000
"""PyYAML makes so many in half a second."""
_MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with these differences."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_values = 0
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Number of values that each complete node stands for."""

    def compose_node(self, parent: Any, index: Any) -> Any:
        before = self._num_values
        self._depth += 1
        if self._depth > _MAX_DEPTH:
            raise yaml.YAMLError("it is nested too deeply")
        is_alias = self.check_event(yaml.AliasEvent)
        node = super().compose_node(parent, index)
        assert node is not None
        self._depth -= 1
        if is_alias and node not in self._sizes:
            raise yaml.YAMLError("an alias in it refers to what contains it")
        self._num_values += self._sizes[node] if is_alias else 1
        if self._num_values > _MAX_VALUES:
            raise yaml.YAMLError(f"it has more than {_MAX_VALUES:,} values")
        self._sizes.setdefault(node, self._num_values - before)
        return node

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
    if len(text) > _MAX_BYTES:
        raise yaml.YAMLError(f"it has more than {_MAX_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader's subclass)
    except ValueError as error:  # a date of month 13, a number of 5,000 digits
        raise yaml.YAMLError(str(error)) from None


def read_yaml_argument(path: Path) -> Any:
    """What a file means that the user has named; it may be a pipe.

    Raises OSError, yaml.YAMLError.
    """
    with path.open("rb") as file:
        return _read(file.read(_MAX_BYTES + 1))


def read_yaml_file(path: Path) -> Any:
    """What a file of a run's folder means. Raises OSError, yaml.YAMLError."""
    return _read(read_file(path, _MAX_BYTES))


def _read(data: bytes) -> Any:
    try:
        return read_yaml(data.decode())
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(str(error)) from None


def apply_override(fields: dict[str, Any], text: str) -> None:
    """Set the key of a `key.sub=value`. Raises ConfigError."""
    key, separator, value_text = text.partition("=")
    if not separator or not key:
        raise ConfigError(f"{text!r} is not an override; write key.sub=value")
    try:
        value = read_yaml(value_text)
    except yaml.YAMLError:
        raise ConfigError(f"the value of the override {text!r} is not valid YAML") from None
    *parents, last = key.split(".")
    section = fields
    for parent in parents:
        section = section.setdefault(parent, {})
        if not isinstance(section, dict):
            raise ConfigError(f"the override {text!r} looks into {parent}, which has no keys")
    section[last] = value


def kept_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides for the command line of other processes, which everybody on a machine can read.

    Secrets in their addresses go there by the environment. Raises ConfigError.
    """
    return tuple(map(_kept, overrides))


def _kept(text: str) -> str:
    key, _, value_text = text.partition("=")
    try:
        value = read_yaml(value_text)
    except yaml.YAMLError:
        return text
    kept_value = kept_in(value)
    return text if kept_value == value else override(key, kept_value)
