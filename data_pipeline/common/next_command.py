"""Commands that are printed for people to type next: whole, and quoted for a shell."""

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
    """`key=value` for a config, which reads values as YAML: text that is something else there is
    quoted."""
    if not isinstance(value, str | Path):
        return f"{key}={json.dumps(value)}"
    text = str(value)
    try:
        is_text = yaml.safe_load(text) == text
    except yaml.YAMLError:
        is_text = False
    return f"{key}={text if is_text else json.dumps(text, ensure_ascii=False)}"


def free_path(path: Path) -> Path:
    """A path for a new output: this one, or the same with a number where something is already."""
    for number in itertools.count(2):
        if not path.exists() or (path.is_dir() and not any(path.iterdir())):
            return path
        path = path.with_name(f"{path.name.removesuffix(f'-{number - 1}')}-{number}")
    raise AssertionError("the numbers ended")


def show_next(commands: Mapping[str, str]) -> None:
    """Print what to type next, and after `#` what that does."""
    width = max(map(len, commands), default=0)
    for number, (line, meaning) in enumerate(commands.items()):
        shown = f"{line:<{width}}   # {meaning}" if meaning else line
        click.echo(f"{'      ' if number else 'next: '}{shown}")
