"""Text and tables fitted to the terminal's width: words are wrapped, numbers are never cut.

In a file or a pipe nothing is wrapped.
"""

import os
import re
import sys
import textwrap
from collections.abc import Container, Sequence
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

_NARROW = 60
"""Width in columns below which a table is printed with one cell per line."""
_LAST_COLUMN = 16
"""Minimum width of text in the last column."""
_NAME = re.compile(r"\s*\S+(?: \S+)*  +|\s*")


def terminal_width() -> int | None:
    """Width of the terminal, or COLUMNS, in columns; None without a terminal."""
    text = os.environ.get("COLUMNS", "")
    if text.isdecimal() and int(text):
        return int(text)
    try:
        return os.get_terminal_size(sys.stdout.fileno()).columns or None
    except (OSError, ValueError, AttributeError):
        return None


def fit(text: str) -> str:
    """Wrap lines between words, with continuations indented below the value."""
    width = terminal_width()
    return text if width is None else "\n".join(_wrapped(line, width) for line in text.split("\n"))


def echo(text: str, *, err: bool = False) -> None:
    """Print lines, wrapped to the terminal's width."""
    click.echo(fit(text), err=err)


def _wrapped(line: str, width: int) -> str:
    if len(line) <= width:
        return line
    name = _NAME.match(line)
    indent = min(name.end() if name else 0, width // 3)
    return "\n".join(
        textwrap.wrap(
            line,
            width,
            subsequent_indent=" " * indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
        )
    )


def table_lines(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    right: Container[int] = (),
    indent: int = 0,
) -> list[str]:
    """Lines of a table; the columns `right` are right-aligned.

    On a narrow terminal the last column is wrapped; without room for that, the table is transposed,
    or printed with one cell per line.
    """
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    before = indent + sum(widths[:-1]) + 2 * len(widths[:-1])
    width = terminal_width()
    last_width = widths[-1] if width is None else min(widths[-1], width - before)
    if last_width < min(widths[-1], _LAST_COLUMN):
        turned = list(zip(heads, *rows, strict=True))
        turned_widths = [max(map(len, column)) for column in zip(*turned, strict=True)]
        if width is not None and sum(turned_widths) + 2 * len(rows) <= width and len(rows) > 1:
            return table_lines(turned[0], turned[1:], right=range(1, len(rows) + 1))
        return _records(heads, rows)
    lines = []
    for row in (heads, *rows):
        first, *more = textwrap.wrap(row[-1], last_width, break_long_words=False) or [""]
        cells = [
            cell.rjust(cell_width) if place in right else cell.ljust(cell_width)
            for place, (cell, cell_width) in enumerate(zip((*row[:-1], first), widths, strict=True))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
        lines += [" " * before + part for part in more]
    return lines


def _records(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """One line per non-empty cell, and a blank line between rows."""
    name_width = max(map(len, heads))
    lines: list[str] = []
    for row in rows:
        lines += [""] * bool(lines)
        lines += [
            fit(f"{head:<{name_width}}  {cell}")
            for head, cell in zip(heads, row, strict=True)
            if cell.strip()
        ]
    return lines


def print_table(console: "Console", table: "Table") -> None:
    """Print a rich table, or one cell per line if the terminal is too narrow."""
    from rich.measure import Measurement
    from rich.text import Text

    from data_pipeline.common.rich_console import SafeConsole

    unlimited = console.options.update(max_width=1 << 16, width=1 << 16)
    needed = Measurement.get(console, unlimited, table)
    width = terminal_width()
    if width is None or needed.maximum <= width:
        wide = SafeConsole(width=max(needed.maximum, 80), stderr=console.stderr, highlight=False)
        return (wide if width is None else console).print(table)
    if width >= _NARROW and needed.minimum <= width:
        return console.print(table)

    def plain(cell: object) -> str:
        return cell.plain if isinstance(cell, Text) else str(cell)

    heads = [plain(column.header) for column in table.columns]
    rows = list(zip(*(map(plain, column.cells) for column in table.columns), strict=True))
    if table.title:
        echo(plain(table.title), err=console.stderr)
    click.echo("\n".join(_records(heads, rows)), err=console.stderr)
    return None
