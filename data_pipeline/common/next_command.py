"""Suggested next commands: complete, and quoted for a shell."""

import itertools
import json
import shlex
from collections.abc import Mapping
from pathlib import Path

import click
import yaml


def command(*words: object) -> str:
    """A megaback command with its arguments."""
    return shlex.join(["megaback", *map(str, words)])


def override(key: str, value: object) -> str:
    """`key=value` of a config override; text that YAML would parse as another type is quoted."""
    if not isinstance(value, str | Path):
        return f"{key}={json.dumps(value)}"
    text = str(value)
    try:
        is_text = yaml.safe_load(text) == text
    except yaml.YAMLError:
        is_text = False
    return f"{key}={text if is_text else json.dumps(text, ensure_ascii=False)}"


def free_path(path: Path) -> Path:
    """The path, with a number appended if something is there."""
    for number in itertools.count(2):
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
        path = path.with_name(f"{path.name.removesuffix(f'-{number - 1}')}-{number}")
    raise AssertionError("unreachable")


def show_next(commands: Mapping[str, str]) -> None:
    """Print the next commands, with their meaning after `#`."""
    width = max(map(len, commands), default=0)
    for number, (line, meaning) in enumerate(commands.items()):
        shown = f"{line:<{width}}   # {meaning}" if meaning else line
        click.echo(f"{'      ' if number else 'next: '}{shown}")
