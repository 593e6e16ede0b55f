"""A line of JSON for a line of JSON: what commands that are used in pipes share."""

import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import click

from data_pipeline.errors import BadRecordError, ConfigError, PromptError
from data_pipeline.number_ranges import finite_json

Answer = dict[str, Any]


def parse_object(line: str, wanted: str) -> Answer:
    """A line's object. Raises PromptError; `wanted` is what it should be."""
    try:
        fields = finite_json(line)
    except (ValueError, RecursionError) as error:
        raise PromptError(f"not valid JSON ({error}); write one object a line") from None
    if not isinstance(fields, dict):
        raise PromptError(f"give {wanted}")
    return fields


def answer_each(lines: Iterable[str], answer: Callable[[str], Answer]) -> Iterator[Answer]:
    """An answer for each line that is not blank; of one that cannot be answered, `error`."""
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
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
