"""A line of JSON for a line of JSON: what commands that are used in pipes share."""

import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click

from data_pipeline.common.number_ranges import finite_json
from data_pipeline.errors import BadRecordError, ConfigError, PromptError
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES

Answer = dict[str, Any]

json_lines_option = click.option(
    "--json",
    "is_json",
    is_flag=True,
    help="Read one JSON object per line of stdin, and print one per line.",
)


def parse_object(line: str, wanted: str) -> Answer:
    """A line's object. Raises PromptError; `wanted` is what it should be."""
    try:
        fields = finite_json(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not valid JSON ({error}); write one object a line") from None
    if not isinstance(fields, dict):
        raise PromptError(f"give {wanted}")
    return fields


def stdin_lines() -> Iterator[str | None]:
    """The lines of stdin as they come; None for one that is too long to be held."""
    maximum = DEFAULT_MAX_RECORD_BYTES
    while line := sys.stdin.readline(maximum + 1):
        is_long = len(line) > maximum
        while len(line) > maximum and not line.endswith("\n"):
            line = sys.stdin.readline(maximum + 1)  # the rest, in pieces
        yield None if is_long else line


def answer_each(lines: Iterable[str | None], answer: Callable[[str], Answer]) -> Iterator[Answer]:
    """An answer for each line that is not blank; of one that cannot be answered, `error`."""
    for number, line in enumerate(lines, start=1):
        if line is not None and not line.strip():
            continue
        try:
            if line is None:
                raise PromptError(
                    f"the line is longer than {DEFAULT_MAX_RECORD_BYTES:,} characters"
                )
            yield answer(line)
        except (PromptError, ConfigError) as error:
            yield {"line": number, "error": str(error)}


def print_all(answers: Iterable[Answer]) -> None:
    """Print each as it comes. Raises BadRecordError, in the end, if some are errors."""
    problems, total = [], 0
    for answer in answers:
        click.echo(json.dumps(answer))
        total += 1
        if "error" in answer:
            problems.append(answer)
    if problems:
        first = problems[0]
        raise BadRecordError(
            f"{len(problems)} of {total} lines were not answered; the first is line "
            f"{first['line']}: {first['error']}"
        )
