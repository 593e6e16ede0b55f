"""Reference of the config: every key with its values, default and description.

The texts are the docstrings of the config's fields, read from the source. Loads no torch.
"""

import difflib
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from data_pipeline.common.number_ranges import Range
from data_pipeline.errors import ConfigError
from megaback import source_definitions as source
from megaback.config import Config
from megaback.config_section import Section

_TYPES = {int: "whole number", float: "number", str: "text", Path: "path"}


@dataclass(frozen=True)
class Values:
    """A part of the values of a key."""

    text: str
    is_literal: bool
    """Whether it is typed as shown: a choice or a range, not the name of a type."""


@dataclass(frozen=True)
class ConfigKey:
    """A key of the config, such as `optimizer.learning_rate`."""

    key: str
    values: tuple[Values, ...]
    is_list: bool
    """Whether the key takes a list of these values."""
    default: str | None
    """None: the key is required; empty: null, whose meaning is in the description."""
    description: str


@dataclass(frozen=True)
class ConfigPart:
    """A section of the config, or the keys outside of sections."""

    name: str
    """Empty for the keys outside of sections."""
    description: str
    keys: tuple[ConfigKey, ...]


def config_parts() -> list[ConfigPart]:
    """All keys, in the order of the config's fields."""
    hints = get_type_hints(Config)
    sections = {name: hint for name, hint in hints.items() if _is_section(hint)}
    top = {name: one for name, one in Config.model_fields.items() if name not in sections}
    described = _described(Config)
    return [
        ConfigPart("", "", tuple(_keys(Config, "", top))),
        *(
            ConfigPart(name, described[name], tuple(_keys(one, f"{name}.", one.model_fields)))
            for name, one in sections.items()
        ),
    ]


def matching_parts(key: str | None) -> list[ConfigPart]:
    """The parts with a key alone, a whole section, or all.

    Raises ConfigError for a key that does not exist, with the closest ones.
    """
    parts = config_parts()
    if key is None:
        return parts
    for part in parts:
        if part.name == key:
            return [part]
        if found := tuple(one for one in part.keys if one.key == key):
            return [ConfigPart(part.name, part.description, found)]
    raise ConfigError(f"there is no key {key}; {_closest(key, parts)}")


def _closest(key: str, parts: list[ConfigPart]) -> str:
    section, _, last = key.rpartition(".")
    keys = [one.key for part in parts for one in part.keys]
    names = [part.name for part in parts if part.name]
    if same := [one for one in keys if one.rpartition(".")[2] == last]:
        return f"did you mean {' or '.join(same)}?"
    if section in names:
        keys = [one for one in keys if one.startswith(f"{section}.")]
    last_words = {one.rpartition(".")[2]: one for one in [*names, *keys]}
    if close := difflib.get_close_matches(last, last_words, n=3):
        return f"did you mean {' or '.join(last_words[name] for name in close)}?"
    if section in names:
        return f"the keys of {section} are {', '.join(keys)}"
    return f"the sections are {', '.join(names)}"


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _described(section: type[Section]) -> dict[str, str]:
    """The string below each field of a section, on one line."""
    node = source.definition(section.__module__, section.__name__)
    found = source.fields(section.__module__, node)
    return {name: " ".join(text.split()) for name, _, _, text in found}


def _keys(section: type[Section], prefix: str, fields: dict[str, FieldInfo]) -> Iterator[ConfigKey]:
    hints = get_type_hints(section, include_extras=True)
    described = _described(section)
    for name, field in fields.items():
        if _is_section(hints[name]):
            yield from _keys(hints[name], f"{prefix}{name}.", hints[name].model_fields)
            continue
        values = tuple(dict.fromkeys(_values(hints[name])))
        default = None if field.is_required() else _default(field.default)
        parts = list(_parts(hints[name]))
        is_list = any(get_origin(one) is tuple for one in parts) and not any(
            map(_is_section, parts)
        )
        yield ConfigKey(prefix + name, values, is_list, default, described[name])
        for part in parts:
            if _is_section(part):
                yield from _keys(part, f"{prefix}{name}[].", part.model_fields)


def _parts(hint: Any) -> Iterator[Any]:
    """A type and all of its type arguments."""
    yield hint
    for part in get_args(hint) if get_origin(hint) not in (Literal, dict) else ():
        yield from _parts(part)  # of Annotated: the type, then its metadata


def _values(hint: Any) -> Iterator[Values]:
    for part in _parts(hint):
        if get_origin(part) is Literal:
            yield from (Values(str(value), True) for value in get_args(part))
        elif get_origin(part) is dict:
            yield Values("mapping of numbers to numbers", False)
        elif part is bool:
            yield from (Values("true", True), Values("false", True))
        elif isinstance(part, Range):
            yield Values(part.described(), True)
        elif isinstance(part, type) and issubclass(part, Enum):
            yield from (Values(str(one.value), True) for one in part)
        elif _is_section(part):
            fields = ", ".join(part.model_fields)
            yield Values(f"path or URL, or list of `{{{fields}}}`", False)
        elif part in _TYPES:
            yield Values(_TYPES[part], False)


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return f"[{', '.join(map(_default, value))}]"
    return str(value.value if isinstance(value, Enum) else value)
