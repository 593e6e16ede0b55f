"""YAML parsing of configs, with bounded size, since a run's folder may be untrusted.

A duplicate key is an error, where PyYAML keeps the last value. The expansion of aliases and merged
keys is counted before it is built: a few lines of them can expand to billions of values.
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
"""Number of values that PyYAML builds in half a second."""
_MAX_DEPTH = 50


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader, with limits, and errors for duplicate keys."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self._num_values = 0
        self._depth = 0
        self._sizes: dict[yaml.Node, int] = {}
        """Number of values in the expansion of each complete node."""

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
            raise yaml.YAMLError("it has an alias to a node that contains it")
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
                    f"the key {key} is given twice, on line {lines[key]} and on line {line}"
                )
            lines[key] = line
        return node


def read_yaml(text: str) -> Any:
    """The value of a YAML text. Raises yaml.YAMLError, also for a duplicate key."""
    if len(text) > _MAX_BYTES:
        raise yaml.YAMLError(f"it has more than {_MAX_BYTES:,} characters")
    try:
        return yaml.load(text, Loader=_Loader)  # noqa: S506 (a safe loader's subclass)
    except ValueError as error:  # a date of month 13, a number of 5,000 digits
        raise yaml.YAMLError(str(error)) from None


def read_yaml_argument(path: Path) -> Any:
    """The value of a file that the user has named; it may be a pipe.

    Raises OSError, yaml.YAMLError.
    """
    with path.open("rb") as file:
        return _read(file.read(_MAX_BYTES + 1))


def read_yaml_file(path: Path) -> Any:
    """The value of a file in a run's folder. Raises OSError, yaml.YAMLError."""
    return _read(read_file(path, _MAX_BYTES))


def _read(data: bytes) -> Any:
    try:
        return read_yaml(data.decode())
    except UnicodeDecodeError as error:
        raise yaml.YAMLError(str(error)) from None


def apply_override(fields: dict[str, Any], text: str) -> None:
    """Apply a `key.sub=value` to a config's fields. Raises ConfigError."""
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
            raise ConfigError(f"the override {text!r} sets a key of {parent}, which has no keys")
    section[last] = value


def kept_overrides(overrides: Sequence[str]) -> tuple[str, ...]:
    """Overrides for the command lines of other processes, which all users of a machine can read.

    Secrets in their URLs are passed in the environment instead. Raises ConfigError.
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
