"""Reference of a run's config: every key with its values, default and explanation."""

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from pydantic.fields import FieldInfo

from data_pipeline.common.number_ranges import Range
from docs.generate import source
from docs.generate.markdown import code, prose, table
from megaback.config import Config
from megaback.config_section import Section

_HEAD = ["key", "values", "default", "description"]
_TYPES = {int: "whole number", float: "number", str: "text", Path: "path"}
_BEGINNING = """\
# Config

One YAML file describes a run. `megaback train`, `plan`, `submit` and `arrow` take it, and any of
its keys as `section.key=value` after it. A key that does not exist, or a value out of range, is
refused before anything starts. The files in `configs/` are examples.

"""


def page() -> str:
    hints = get_type_hints(Config)
    sections = {name: hint for name, hint in hints.items() if _is_section(hint)}
    top = {name: one for name, one in Config.model_fields.items() if name not in sections}
    text = _BEGINNING + "## Top level\n" + table(_HEAD, _rows(Config, "", top))
    below = _explained(Config)
    for name, section in sections.items():
        text += f"## {name}\n{prose(below[name])}\n\n"
        text += table(_HEAD, _rows(section, f"{name}.", section.model_fields))
    return text.rstrip() + "\n"


def _is_section(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, Section)


def _explained(section: type[Section]) -> dict[str, str]:
    """The string below each field of a section."""
    node = source.definition(section.__module__, section.__name__)
    return {name: text for name, _, _, text in source.fields(section.__module__, node)}


def _rows(section: type[Section], prefix: str, fields: dict[str, FieldInfo]) -> Iterator[list[str]]:
    hints = get_type_hints(section, include_extras=True)
    below = _explained(section)
    for name, field in fields.items():
        values = ", ".join(dict.fromkeys(_values(hints[name])))
        default = "required" if field.is_required() else _default(field.default)
        yield [code(prefix + name), values, default, prose(below[name])]
        for part in _parts(hints[name]):
            if _is_section(part):
                yield from _rows(part, f"{prefix}{name}[].", part.model_fields)


def _parts(hint: Any) -> Iterator[Any]:
    """A type and all that it is made of."""
    yield hint
    for part in get_args(hint) if get_origin(hint) is not Literal else ():
        yield from _parts(part)  # of Annotated: the type, then its metadata


def _values(hint: Any) -> Iterator[str]:
    for part in _parts(hint):
        if get_origin(part) is Literal:
            yield from (code(str(value)) for value in get_args(part))
        elif part is bool:
            yield from (code("true"), code("false"))
        elif isinstance(part, Range):
            yield code(part.described())
        elif isinstance(part, type) and issubclass(part, Enum):
            yield from (code(one.value) for one in part)
        elif _is_section(part):
            yield f"path or URL, or list of {code('{' + ', '.join(part.model_fields) + '}')}"
        elif part in _TYPES:
            yield _TYPES[part]


def _default(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return code(str(value).lower())
    return code(str(value.value if isinstance(value, Enum) else value))
