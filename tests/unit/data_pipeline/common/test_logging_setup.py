"""Logging setup: levels, format, and no output that bypasses it."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.common.logging_setup import LEVELS, LOG_VARIABLE
from data_pipeline.errors import ConfigError
from tests.helpers.paths import ROOT

# In its own process: the setup changes the root logger.
PROGRAM = """
import logging, sys
from data_pipeline.common import logging_setup
logging_setup.set_up_logging()
for level in ("debug", "info", "warning", "error"):
    getattr(logging.getLogger("megaback.part"), level)("of %s", level)
    getattr(logging.getLogger("other.part"), level)("theirs")
logging.getLogger("megaback").warning("two\\nlines")
logging_setup.show_rank(3)
logging.getLogger("megaback").info("after")
"""
COMMAND_LAYER = {"data_pipeline/common/command.py"}
"""Module that prints error messages."""


def run(*words: object, **variables: str) -> "subprocess.CompletedProcess[str]":
    environment = {name: value for name, value in os.environ.items() if name != LOG_VARIABLE}
    return subprocess.run(
        [sys.executable, *map(str, words)],
        env=environment | variables,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def lines_at(level: str) -> list[str]:
    return run("-c", PROGRAM, MEGABACK_LOG=level).stderr.splitlines()


def test_lines_contain_level_and_rank() -> None:
    *lines, last = lines_at("")

    assert lines == [
        "megaback: of info",
        "megaback: warning: of warning",
        "other: warning: theirs",
        "megaback: error: of error",
        "other: error: theirs",
        r"megaback: warning: two\nlines",
    ]
    time, _, text = last.partition(" rank 3: ")
    assert text == "megaback: after"
    assert len(time.split()) == 2


@pytest.mark.parametrize("number", range(len(LEVELS)))
def test_messages_below_the_level_are_dropped(number: int) -> None:
    text = "\n".join(lines_at(LEVELS[number].upper()))

    shown = [level for level in LEVELS if f"of {level}" in text]
    assert shown == [*LEVELS[number:]]


@pytest.mark.parametrize("words", [("-v", "plan"), ("plan", "-v"), ("plan", "--verbose")])
def test_verbose_precedes_or_follows_the_command(words: tuple[str, ...]) -> None:
    quiet = run("-m", "megaback", "plan", "absent.yaml")
    verbose = run("-m", "megaback", *words, "absent.yaml")

    assert quiet.stderr.count("\n") == 1
    first, second = verbose.stderr.splitlines()
    assert first == "megaback: debug: reading the config absent.yaml with no overrides"
    assert second == quiet.stderr.strip()
    assert verbose.stdout == quiet.stdout == ""


def test_an_unknown_level_is_refused() -> None:
    done = run("-m", "megaback", "plan", "absent.yaml", MEGABACK_LOG="loud")

    assert done.returncode == ConfigError.exit_code
    message = "MEGABACK_LOG is 'loud'; set it to one of debug, info, warning, error"
    assert done.stderr == f"megaback: error: {message}\n"


def test_a_program_that_imports_megaback_keeps_its_logging() -> None:
    look = "import logging, megaback; megaback.load; loggers = [logging.getLogger(), "
    look += "*logging.Logger.manager.loggerDict.values()]; print([one.name for one in loggers "
    look += "if 'megaback' in getattr(one, 'name', '') and (one.handlers or one.level)], "
    look += "logging.getLogger().handlers)"

    done = run("-c", look, MEGABACK_LOG="debug")

    assert (done.stdout, done.stderr) == ("[] []\n", "")


def bare_prints(source: str) -> list[int]:
    """Lines of a module that print, except its script part."""
    tree = ast.parse(source)
    scripts = [node for node in tree.body if isinstance(node, ast.If)]
    ours = {id(node) for script in scripts for node in ast.walk(script)}
    return [
        node.lineno
        for node in ast.walk(tree)
        if id(node) not in ours
        and isinstance(node, ast.Call)
        and ast.unparse(node.func) in ("print", "sys.stdout.write", "sys.stderr.write")
    ]


def test_bare_prints_finds_a_print() -> None:
    assert bare_prints(
        "def main():\n    print('x')\nif __name__ == '__main__':\n    print()\n"
    ) == [2]


def test_only_commands_print() -> None:
    found = {
        path.relative_to(ROOT).as_posix(): lines
        for package in ("data_pipeline", "megaback", "launcher", "tools")
        for path in sorted(Path(ROOT, package).rglob("*.py"))
        if (lines := bare_prints(path.read_text(encoding="utf-8")))
    }
    found.pop("data_pipeline/common/driver_reports.py")  # tracebacks only
    assert set(found) == COMMAND_LAYER
