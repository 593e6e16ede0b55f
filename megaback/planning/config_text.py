"""YAML text of a new config, with the reason of each value as a comment. Loads no torch."""

from collections.abc import Sequence
from textwrap import wrap

import yaml

from megaback.planning.new_config import Choice, fields_of

_MAX_COLUMNS = 110
_COMMENT_COLUMN = 32


def config_text(choices: Sequence[Choice], head: Sequence[str]) -> str:
    """The file: comments, then keys by section."""
    reasons = {choice.key: choice.reason for choice in choices}
    lines = [f"# {part}" for line in head for part in wrap(line, _MAX_COLUMNS - 2)]
    for name, value in fields_of(choices).items():
        if isinstance(value, dict):
            lines.append(f"{name}:")
            for key, one in value.items():
                lines += _lines(f"  {key}", one, reasons[f"{name}.{key}"])
        else:
            lines += _lines(name, value, reasons[name])
    return "\n".join(lines) + "\n"


def _lines(key: str, value: object, reason: str) -> list[str]:
    indent = " " * (len(key) - len(key.lstrip()))
    line = f"{key}: {scalar(value)}"
    if not reason:
        return [line]
    whole = f"{line:<{_COMMENT_COLUMN}}  # {reason}"
    if len(whole) <= _MAX_COLUMNS:
        return [whole]
    return [f"{indent}# {reason}", line]


def scalar(value: object) -> str:
    """A value as YAML."""
    if isinstance(value, float):
        # YAML 1.1 reads 1e-05, without a point, as text.
        text = repr(value)
        mantissa, e, exponent = text.partition("e")
        return f"{mantissa if '.' in mantissa else mantissa + '.0'}{e}{exponent}"
    return str(yaml.safe_dump(value, width=1 << 20)).removesuffix("\n").removesuffix("\n...")
