"""Escaping of control characters: properties of all text, and the output of processes."""

import ast
import json
import os
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common.control_characters import escaped, on_one_line
from tests.helpers.paths import ROOT

ANY_TEXT = st.text(st.characters(categories=None) | st.sampled_from("\x1b\x9b\x7f\r\n\t\\\u202e"))
ALL = "".join(map(chr, range(sys.maxunicode + 1)))
HOSTILE = "\x1b[31mred\x1b]8;;http://x\x07\x9b2J\u202e\x7f\rover\U000e0041[bold]b[/bold]"
SHOWN = r"\x1b[31mred\x1b]8;;http://x\x07\x9b2J\u202e\x7f\x0dover\U000e0041[bold]b[/bold]"


def test_only_line_breaks_and_tabs_are_not_escaped() -> None:
    left = escaped(ALL)
    assert {one for one in left if unicodedata.category(one) in ("Cc", "Cs")} == {"\n", "\t"}
    assert not re.search("[\u202a-\u202e\u2066-\u2069\U000e0000-\U000e007f]", left)
    for kept in ("ñ", "م\u200cی", "👩\u200d🚀", "\u200f", "𝔘", "\\x1b", "\ufeff"):
        assert escaped(kept) == kept


@given(ANY_TEXT)
def test_escaping_is_idempotent(text: str) -> None:
    once = escaped(text)
    assert escaped(once) == once
    assert once.encode().decode() == once  # no lone surrogates
    assert once.count("\n") == text.count("\n")


@given(st.text(st.characters(categories=None, exclude_characters="\\")))
def test_escapes_can_be_decoded(text: str) -> None:
    def character(found: re.Match[str]) -> str:
        return str(ast.literal_eval(f"'{found[0]}'"))

    pattern = r"\\(?:x\w{2}|u\w{4}|U\w{8})"
    assert re.sub(pattern, character, escaped(text)) == text


@given(ANY_TEXT, st.integers(0, 30))
def test_escaping_parts_equals_escaping_the_whole(text: str, cut: int) -> None:
    if "\r\n" not in text[cut - 1 : cut + 1]:
        assert escaped(text[:cut]) + escaped(text[cut:]) == escaped(text)


@given(ANY_TEXT)
def test_on_one_line_removes_line_breaks(text: str) -> None:
    assert len(on_one_line(text).encode().splitlines()) <= 1


_PRINTING = """
import json, logging, sys, warnings
from data_pipeline.common.console import only_comments, protect_console
protect_console()
import click
from rich.table import Table
from rich.text import Text
from data_pipeline.common.rich_console import SafeConsole, SafeLive, SafeProgress
if sys.argv[2] == "comment":
    only_comments()
text = json.loads(sys.argv[1])
print(text)
click.echo(text, color=True)
click.echo(text.encode())
sys.stdout.buffer.write(text.encode()[:20])
sys.stdout.buffer.write(text.encode()[20:] + b"\\n")
sys.stdout.flush()
if sys.argv[2] == "rich":
    console = SafeConsole(width=300, highlight=False)
    console.print(text)
    table = Table(text)
    table.add_row(Text(text, "red"))
    console.print(table)
    with SafeLive(console=console, auto_refresh=False) as live:
        live.update(Text(text), refresh=True)
        print(text)
        print(text, file=sys.stderr)
    with SafeProgress(console=console) as bars:
        bars.add_task("bar", total=1)
        print(text)
print(text, file=sys.stderr)
logging.warning(text)
warnings.warn(text)
click.echo(text, err=True, color=True)
"""


def printed(text: str, *, mode: str = "", terminal: bool) -> tuple[bytes, bytes]:
    """Standard output, to a terminal or a pipe, and standard error of a process."""
    command = [sys.executable, "-c", _PRINTING, json.dumps(text), mode]
    how = {"stderr": subprocess.PIPE, "cwd": ROOT, "stdin": subprocess.DEVNULL}
    environment = {**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}
    if not terminal:
        done = subprocess.run(
            command, stdout=subprocess.PIPE, env=environment, check=True, timeout=60, **how
        )
        return done.stdout, done.stderr
    ours, theirs = os.openpty()
    with subprocess.Popen(command, stdout=theirs, env=environment, **how) as process:
        os.close(theirs)
        output = read_terminal(ours)
        assert process.stderr is not None
        errors = process.stderr.read()
    assert process.returncode == 0, errors
    return output, errors


def read_terminal(descriptor: int) -> bytes:
    """All output to a terminal until it is closed."""
    parts = []
    try:
        while part := os.read(descriptor, 1 << 16):
            parts.append(part)
    except OSError:
        pass
    os.close(descriptor)
    return b"".join(parts)


def test_a_result_in_a_pipe_is_exact_and_messages_are_escaped() -> None:
    output, errors = printed(HOSTILE, terminal=False)
    assert output == f"{HOSTILE}\n".encode() * 4
    assert errors.decode().count(SHOWN) == 4
    assert escaped(errors.decode()) == errors.decode()


def test_a_comment_in_a_pipe_is_escaped() -> None:
    """Slurm's logs, and output of remote ranks over ssh, are read on terminals."""
    output, _ = printed(HOSTILE, mode="comment", terminal=False)
    assert output.decode() == f"{SHOWN}\n" * 4


def test_names_that_are_not_utf_8_are_exact_in_a_pipe() -> None:
    code = "from data_pipeline.common.console import protect_console; protect_console()\n"
    code += r"import sys; print('a\udcff', '\ud800'); print('a\udcff', file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, check=True)
    assert (done.stdout, done.stderr) == (b"a\xff \\ud800\n", b"a\\udcff\n")


@pytest.mark.parametrize("mode", ["", "rich"])
def test_on_a_terminal_only_our_sequences_are_unescaped(mode: str) -> None:
    output, _ = printed(HOSTILE, mode=mode, terminal=True)
    plain = re.sub(
        r"\x1b\[(?:0|31|1|38;5;\d+|35|36)m|\x1b\[\?25[hl]|\x1b\[\d?[AK]|\r", "", output.decode()
    )
    assert plain.count(SHOWN) == (7 if mode else 4), plain
    assert escaped(plain) == plain
    assert b"\x1b[31mred" not in output
    assert b"[bold]b[/bold]" in output


def test_only_one_module_prints_escape_sequences() -> None:
    """Other modules would bypass the escaping, or have their sequences escaped."""
    pattern = re.compile(
        r"^\s*from rich\.\w+ import .*\b(?:Console|Live|Progress|Status)\b"
        r"|\bclick\.(?:style|secho|progressbar|echo_via_pager)\b|\\x1b|\\033",
        re.MULTILINE,
    )
    found = {}
    for package in ("data_pipeline", "megaback", "launcher", "tools"):
        for path in (ROOT / package).rglob("*.py"):
            for one in pattern.findall(path.read_text(encoding="utf-8")):
                found.setdefault(str(path.relative_to(ROOT)), []).append(one.strip())
    assert found.keys() == {
        "data_pipeline/common/control_characters.py",  # in a docstring
        "data_pipeline/common/interrupts.py",  # the cursor, shown again by os.write
        "data_pipeline/common/rich_console.py",
        "data_pipeline/common/terminal.py",  # a type
    }, found
