"""Markdown that GitHub and mkdocs render alike."""

import re
from collections.abc import Iterable, Sequence

_CODE = re.compile(r"(`[^`]*`)")
_MARKS = re.compile(r"[\\*<]|(?<!\w)_|_(?!\w)")
"""Characters that Markdown takes for its own; an underscore within a word is none."""


def prose(text: str) -> str:
    """Text of help or of a docstring; only its code spans keep their meaning."""
    parts = _CODE.split(" ".join(text.split()))
    parts[::2] = [_MARKS.sub(r"\\\g<0>", part) for part in parts[::2]]
    return "".join(parts)


def code(text: str) -> str:
    return f"`{text}`" if text else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; empty without rows."""
    lines = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    if not lines:
        return ""
    rule = ["---"] * len(head)
    return "".join("| " + " | ".join(row) + " |\n" for row in [list(head), rule, *lines]) + "\n"
