"""JSON lines on stdin and stdout, for commands in pipes."""

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
    """The object on a line. Raises PromptError; `wanted` describes what is expected."""
    try:
        fields = finite_json(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not valid JSON ({error}); write one object per line") from None
    if not isinstance(fields, dict):
        raise PromptError(f"give {wanted}")
    return fields


def stdin_lines() -> Iterator[str | None]:
    """The lines of stdin as they arrive; None for one that exceeds the limit."""
    maximum = DEFAULT_MAX_RECORD_BYTES
    while line := sys.stdin.readline(maximum + 1):
        is_long = len(line) > maximum
        while len(line) > maximum and not line.endswith("\n"):
            line = sys.stdin.readline(maximum + 1)  # discards the rest
        yield None if is_long else line


def answer_each(lines: Iterable[str | None], answer: Callable[[str], Answer]) -> Iterator[Answer]:
    """An object per line that is not blank, with `error` for an invalid one."""
    for number, line in enumerate(lines, start=1):
        if line is not None and not line.strip():
            continue
        try:
            if line is None:
                raise PromptError(
                    f"the line is longer than {DEFAULT_MAX_RECORD_BYTES:,} characters; shorten it"
                )
            yield answer(line)
        except (PromptError, ConfigError) as error:
            yield {"line": number, "error": str(error)}


def print_all(answers: Iterable[Answer]) -> None:
    """Print each as it arrives. Raises BadRecordError at the end if some are errors."""
    problems, total = [], 0
    for answer in answers:
        click.echo(json.dumps(answer))
        total += 1
        if "error" in answer:
            problems.append(answer)
    if problems:
        first = problems[0]
        raise BadRecordError(
            f"{len(problems)} of {total} lines have errors; the first is line "
            f"{first['line']}: {first['error']}"
        )
