"""Reference of a run's config: every key with its values, default and explanation."""

from collections.abc import Iterator

from docs.generate.markdown import code, prose, table
from megaback.config_reference import ConfigPart, config_parts

_HEAD = ["key", "values", "default", "description"]
_BEGINNING = """\
# Config

One YAML file describes a run. `megaback train`, `plan`, `submit` and `arrow` take it, and any of
its keys as `section.key=value` after it. A key that does not exist, or a value out of range, is
refused before anything starts. `megaback new` writes a config for a size or a budget, and the files
in `configs/` are examples; `megaback config --explain` prints this page, or a part of it.

"""


def page() -> str:
    text = _BEGINNING
    for part in config_parts():
        description = f"{prose(part.description)}\n\n" if part.description else ""
        text += f"## {part.name or 'Top level'}\n{description}" + table(_HEAD, _rows(part))
    return text.rstrip() + "\n"


def _rows(part: ConfigPart) -> Iterator[list[str]]:
    for one in part.keys:
        values = [code(value.text) if value.is_literal else value.text for value in one.values]
        listed = ("list of " if one.is_list else "") + ", ".join(values)
        default = "required" if one.default is None else code(one.default)
        yield [code(one.key), listed, default, prose(one.description)]
