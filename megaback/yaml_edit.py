"""Edits of a YAML config that keep its comments and layout: values of keys within sections.

The text around the edited values is kept byte by byte. An edit is checked by reading the result: a
text whose layout is not understood is refused, never damaged.
"""

from collections.abc import Mapping
from typing import Any

import yaml

from data_pipeline.errors import ConfigError
from megaback.yaml_text import read_yaml

_INDENT = "  "

_Edit = tuple[int, int, str]
"""Start and end of a replaced part of the text, and what replaces it."""


def with_values(text: str, values: Mapping[str, object]) -> str:
    """The text with other values by key, such as `zero.stage`.

    Raises ConfigError for a text in which they cannot be set without changing anything else.
    """
    if not values:
        return text
    expected = _expected(text, values)
    root = yaml.compose(text, Loader=yaml.SafeLoader)
    assert isinstance(root, yaml.MappingNode)
    newline = "\r\n" if "\r\n" in text else "\n"
    sections: dict[str, dict[str, str]] = {}
    for key, value in values.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = _scalar(value)
    edits = [
        edit
        for section, fields in sections.items()
        for edit in _section_edits(text, root, section, fields, newline)
    ]
    changed = text
    for start, end, replacement in sorted(edits, reverse=True):
        changed = changed[:start] + replacement + changed[end:]
    if _read(changed) != expected:
        raise _refusal(values)
    return changed


def _section_edits(
    text: str, root: yaml.MappingNode, section: str, fields: dict[str, str], newline: str
) -> list[_Edit]:
    value = next((value for key, value in root.value if key.value == section), None)
    if value is None:
        lines = [f"{section}:", *(f"{_INDENT}{name}: {word}" for name, word in fields.items())]
        before = "" if text.endswith("\n") else newline
        return [(len(text), len(text), before + newline.join(lines) + newline)]
    if not isinstance(value, yaml.MappingNode) or not value.value:
        raise _refusal({f"{section}.{name}": word for name, word in fields.items()})
    known = {name.value: node for name, node in value.value if isinstance(name, yaml.ScalarNode)}
    edits: list[_Edit] = [
        _replacement(known[name], word) for name, word in fields.items() if name in known
    ]
    missing = [f"{name}: {word}" for name, word in fields.items() if name not in known]
    if missing:
        edits.append(_insertion(text, value, missing, newline))
    return edits


def _replacement(value: yaml.Node, word: str) -> _Edit:
    start, end = value.start_mark.index, value.end_mark.index
    return start, end, word if end > start else f" {word}"


def _insertion(text: str, section: yaml.MappingNode, missing: list[str], newline: str) -> _Edit:
    """Insertion of keys after the last one of a section."""
    last_key, last = section.value[-1]
    if section.flow_style:
        return last.end_mark.index, last.end_mark.index, "".join(f", {one}" for one in missing)
    indent = text[
        last_key.start_mark.index - last_key.start_mark.column : last_key.start_mark.index
    ]
    if not isinstance(last, yaml.ScalarNode):
        place = section.value[0][0].start_mark
        lines = "".join(f"{one}{newline}{indent}" for one in missing)
        return place.index, place.index, lines
    end = text.find("\n", last.end_mark.index)
    if end < 0:
        return len(text), len(text), "".join(f"{newline}{indent}{one}" for one in missing)
    return end + 1, end + 1, "".join(f"{indent}{one}{newline}" for one in missing)


def _scalar(value: object) -> str:
    return str(yaml.safe_dump(value)).removesuffix("\n").removesuffix("\n...")


def _expected(text: str, values: Mapping[str, object]) -> Any:
    fields = _copied(read_yaml(text))
    for key, value in values.items():
        section, _, name = key.partition(".")
        part = fields.setdefault(section, {}) if isinstance(fields, dict) else None
        if not isinstance(part, dict):
            raise _refusal(values)
        part[name] = value
    return fields


def _copied(value: Any) -> Any:
    """A copy in which an alias is a value of its own, so that an edit of both is noticed."""
    if isinstance(value, dict):
        return {key: _copied(one) for key, one in value.items()}
    return [_copied(one) for one in value] if isinstance(value, list) else value


def _read(text: str) -> Any:
    try:
        return read_yaml(text)
    except yaml.YAMLError:
        return None


def _refusal(values: Mapping[str, object]) -> ConfigError:
    words = ", ".join(f"{key}: {_scalar(value)}" for key, value in values.items())
    return ConfigError(
        f"the layout of the config does not allow these values to be set alone; set them by hand: "
        f"{words}"
    )
