"""Completion of command lines in shells."""

import subprocess
import sys
from pathlib import Path

import pytest
from click.shell_completion import ShellComplete

from megaback.cli import main
from tests.helpers.paths import ROOT

DOCUMENTED = (ROOT / "docs/completion.md").read_text(encoding="utf-8")


def completions(line: str) -> list[str]:
    """Values offered for the last word of a line, or the types of those that the shell finds."""
    *words, incomplete = line.split(" ")
    found = ShellComplete(main, {}, "megaback", "").get_completions(words, incomplete)
    return [one.value if one.type == "plain" else one.type for one in found]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("ser", ["serve"]),
        ("shards ver", ["verify"]),
        ("sample --max", ["--max-new-tokens"]),
        ("convert run --to g", ["gguf"]),
        ("train conf", ["file"]),
        ("shards build --source bo", ["file"]),
        ("shards build --source a.jsonl b.jsonl --in", []),
    ],
)
def test_commands_options_choices_and_files_complete(line: str, offered: list[str]) -> None:
    assert completions(line) == offered


def test_completion_of_a_group_imports_no_command(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "data_pipeline.shards.verify", raising=False)

    assert "verify" in completions("shards ")
    assert "data_pipeline.shards.verify" not in sys.modules


def test_the_documented_line_completes_in_bash() -> None:
    line = 'eval "$(_MEGABACK_COMPLETE=bash_source megaback)"'
    assert line in DOCUMENTED
    asking = "COMP_WORDS=(megaback shards ver) COMP_CWORD=2; _megaback_completion megaback; "
    done = subprocess.run(
        [
            "bash",
            "-c",
            f'PATH="$1:$PATH"; {line}; {asking} echo "${{COMPREPLY[@]}}"',
            "bash",
            str(Path(sys.executable).parent),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )

    assert (done.stdout, done.stderr) == ("verify\n", "")
