"""Detection of unquoted patterns and texts that the shell split into several words."""

import os
import shlex
from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path

import click

from data_pipeline.common.source_type import SourceType


def require_quoted(command: click.Command, words: Sequence[str]) -> None:
    """Raises click.UsageError when an option is followed by the files of an expanded pattern.

    Click would take the files for arguments, or report unexpected arguments without the cause.
    """
    patterns = pattern_options(command)
    for number, word in enumerate(words):
        following = _values(words[number + 1 :])
        if word not in patterns or len(following) < 2:
            continue
        files = [value for value in following if Path(value).suffix == Path(following[0]).suffix]
        if len(files) > 1 and all(map(os.path.exists, files)):
            raise click.UsageError(
                f"{word} takes one value, and {len(files)} files follow it: the shell expanded a "
                f"pattern. Quote it: {word} {shlex.quote(_pattern(files))}"
            )


def pattern_options(command: click.Command) -> set[str]:
    """Options of a command that name a source, which may be a pattern."""
    return {
        name
        for option in command.params
        if isinstance(option, click.Option) and isinstance(option.type, SourceType)
        for name in option.opts
    }


def too_many(error: click.UsageError, words: Sequence[str]) -> click.UsageError:
    """The error of unexpected arguments, with its likely cause."""
    if not error.message.startswith("Got unexpected extra argument"):
        return error
    for number, word in enumerate(words):
        values = _values(words[number + 1 :])
        if word.startswith("--") and len(values) > 1:
            return click.UsageError(
                f"{error.message.rstrip('.')}. If it belongs to {word}, quote the value: "
                f"{word} {shlex.quote(' '.join(values))}",
                error.ctx,
            )
    return error


def _values(words: Sequence[str]) -> list[str]:
    """The words before the next option."""
    values = []
    for word in words:
        if word.startswith("--"):
            break
        values.append(word)
    return values


def _pattern(files: Sequence[str]) -> str:
    """A pattern that matches these files."""
    columns = list(zip(*files, strict=False))
    head = _common(columns)
    rest = [file[len(head) :][::-1] for file in files]
    return f"{head}*{_common(list(zip(*rest, strict=False)))[::-1]}"


def _common(columns: Sequence[tuple[str, ...]]) -> str:
    """The longest prefix of columns with equal characters."""
    equal = takewhile(lambda column: len(set(column)) == 1, columns)
    return "".join(column[0] for column in equal)
