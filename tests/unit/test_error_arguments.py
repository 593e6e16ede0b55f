"""Library errors name arguments, which commands show as their options."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from data_pipeline.common.command import Command
from data_pipeline.errors import ConfigError

ROOT = Path(__file__).parents[2]
LIBRARY = [
    path
    for package in ("megaback", "data_pipeline")
    for path in sorted((ROOT / package).rglob("*.py"))
]
OF_COMMANDS = {
    "click.option",
    "click.Option",
    "click.argument",
    "click.UsageError",
    "command",
    "echo",
    "examples",
    "_git",
}
"""Functions that take option names: declarations, command output, other programs."""
WHOLE_COMMAND = re.compile(r"`[a-z]+ [^`]*`")
OPTION = re.compile(r"(?<![\w-])--[a-z{]")


def texts_of(node: ast.AST) -> Iterator[tuple[int, str]]:
    """Strings that code may show, except docstrings and strings within a command's function."""
    if isinstance(node, ast.FunctionDef):
        names = {ast.unparse(getattr(one, "func", one)) for one in node.decorator_list}
        if "click.command" in names:
            return
    if isinstance(node, ast.Call) and ast.unparse(node.func) in OF_COMMANDS:
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.lineno, node.value
    elif isinstance(node, ast.JoinedStr):
        parts = (one.value if isinstance(one, ast.Constant) else "{}" for one in node.values)
        yield node.lineno, "".join(map(str, parts))
        for part in node.values:
            if not isinstance(part, ast.Constant):
                yield from texts_of(part)
    else:
        for child in ast.iter_child_nodes(node):
            yield from texts_of(child)


def with_options(source: str) -> list[str]:
    return [
        f"{line}: {text}"
        for line, text in texts_of(ast.parse(source))
        if OPTION.search(WHOLE_COMMAND.sub("", text))
    ]


def test_no_library_error_names_an_option() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): with_options(path.read_text(encoding="utf-8"))
        for path in LIBRARY
    }
    texts = {
        name: [line.partition(": ")[2] for line in lines] for name, lines in found.items() if lines
    }
    assert texts == {
        "megaback/model/flash_attention.py": [  # commands that it advises
            "pip install --no-build-isolation -e '.[flash]'",
            "pip install --pre flash-attn-4",
        ],
        "megaback/planning/plan.py": ["--nodes"],  # a word of command lines that it makes
    }


@pytest.mark.parametrize(
    ("source", "is_found"),
    [
        ('raise ConfigError(f"--out {out} is there")', True),
        ('note = "choose another --out"', True),
        ('raise ConfigError(f"run `megaback shards build --out {out}` again")', False),
        ('@click.command()\ndef main():\n    raise ConfigError("--out is there")', False),
        ('@click.option("--out")\ndef one():\n    """Without --out."""', False),
    ],
)
def test_an_option_in_an_error_is_found(source: str, is_found: bool) -> None:
    assert bool(with_options(source)) is is_found


def test_a_command_shows_arguments_as_its_options() -> None:
    @click.command(cls=Command)
    @click.option("--source", "-s", "sources", multiple=True)
    def main(sources: tuple[str, ...]) -> None:
        raise ConfigError(f"`sources` are {sources}; `unknown` and `megaback sources` stay")

    result = CliRunner().invoke(main, ["-s", "a"])
    assert result.output == (
        "megaback: error: --source are ('a',); `unknown` and `megaback sources` stay\n"
    )
    assert result.exit_code == ConfigError.exit_code
