"""Standard streams: comments never interrupt the work, and a lost result is an error.

Each test runs a process with the streams of a shell or a terminal.
"""

import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest

# Prints by `print`, `logging`, `warnings` and to the buffer, then reports losses.
_COMMENTING = """
import json, logging, os, sys, warnings
from data_pipeline.common.console import console_losses, only_comments, protect_console
protect_console()
only_comments({patience})
logging.basicConfig(stream=sys.stdout)
for number in range(3):
    print("a comment", flush=True)
    print("not flushed")
    logging.warning("a record")
    warnings.warn("a warning")
    sys.stdout.buffer.write(b"bytes")
    print("an error", file=sys.stderr)
with open(sys.argv[1], "w") as file:
    json.dump([console_losses(), file.fileno()], file)
"""


def streams(kind: str) -> "tuple[int, int | None]":
    """A descriptor to print to, and another to close at the end."""
    if kind == "full":
        return os.open("/dev/full", os.O_WRONLY), None
    ours, theirs = os.openpty() if kind == "terminal" else os.pipe()
    if kind in ("pipe", "terminal"):  # the reader is gone
        os.close(ours)
        return theirs, None
    os.set_blocking(theirs, False)
    with suppress(BlockingIOError):
        while True:
            os.write(theirs, bytes(1 << 16))
    os.set_blocking(theirs, kind != "non-blocking")
    return theirs, ours


def run(code: str, path: Path, output: int) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-c", code, path],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("pipe", "Broken pipe"),
        ("terminal", "Input/output error"),
        ("full", "No space left on device"),
        ("stalled", None),
        ("non-blocking", None),
    ],
)
def test_a_comment_that_cannot_be_printed_is_dropped(
    kind: str, reason: str | None, tmp_path: Path
) -> None:
    output, other = streams(kind)
    code = _COMMENTING.format(patience="0.2" if reason is None else "")
    result = run(code, tmp_path / "report", output)
    os.close(output)
    if other is not None:
        os.close(other)

    losses = {} if reason is None else f'{{"standard output": "{reason}"}}'
    assert (tmp_path / "report").read_text().startswith(f"[{losses}")
    assert (result.returncode, result.stderr.count("an error\n")) == (0, 3)
    assert "Exception ignored" not in result.stderr


def test_a_stalled_reader_gets_the_number_of_dropped_bytes(tmp_path: Path) -> None:
    code = """
import sys
from data_pipeline.common.console import only_comments, protect_console
protect_console()
only_comments(0.1)
for number in range(100):
    print("x" * 999, flush=True)
print("stalled", file=sys.stderr)
sys.stdin.readline()
print("the end", flush=True)
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code, tmp_path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert process.stderr.readline() == b"stalled\n"
    shown = os.read(process.stdout.fileno(), 1 << 20)  # the contents of the pipe
    rest, _ = process.communicate(b"\n", timeout=60)

    missed_bytes = 100_000 - len(shown)
    note = f"\n[{missed_bytes:,} bytes were dropped while the reader was stalled]\nthe end\n"
    assert missed_bytes > 0
    assert rest.decode() == note


def test_closed_descriptors_are_not_reused_for_files(tmp_path: Path) -> None:
    """`<&- >&- 2>&-`: a library that prints would write into a checkpoint."""
    command = ["bash", "-c", 'exec "$@" <&- >&- 2>&-', "bash", sys.executable, "-c"]
    code = _COMMENTING.format(patience="")
    assert subprocess.run([*command, code, tmp_path / "report"], check=False).returncode == 0
    assert (tmp_path / "report").read_text() == "[{}, 3]"


def test_a_closed_standard_input_is_an_empty_one() -> None:
    code = "from data_pipeline.common.console import *; protect_console(); import sys\n"
    code += "print([sys.stdin.buffer.read(), sys.stdin.read()])"
    command = ["bash", "-c", 'exec "$@" <&-', "bash", sys.executable, "-c", code]
    assert subprocess.run(command, check=True, capture_output=True).stdout == b"[b'', '']\n"


@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [("pipe", 141, ""), ("full", 74, "'standard output': No space left on device")],
)
@pytest.mark.parametrize("command", [["shards", "inspect"], ["inspect"], ["--help"]])
def test_a_result_that_cannot_be_printed_has_its_own_code(
    command: list[str], kind: str, code: int, words: str, tiny_shards: Path
) -> None:
    output, _ = streams(kind)
    paths = [] if command == ["--help"] else [str(tiny_shards)]
    result = subprocess.run(
        [sys.executable, "-m", "megaback", *command, *paths],
        stdout=output,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        timeout=60,
    )
    os.close(output)
    assert (result.returncode, result.stderr.count("\n")) == (code, 1 if words else 0)
    assert words in result.stderr


@pytest.mark.parametrize("kind", ["pipe", "terminal", "full"])
def test_an_unread_error_message_does_not_change_the_code(kind: str, tmp_path: Path) -> None:
    output, _ = streams(kind)
    command = [sys.executable, "-m", "megaback", "shards", "inspect", tmp_path]
    assert subprocess.run(command, stderr=output, check=False, timeout=60).returncode == 30
    os.close(output)


def test_a_command_that_writes_files_succeeds_without_a_console(
    tiny_text_folder: Path, tmp_path: Path
) -> None:
    """Both streams: the progress of a build goes to standard error."""
    output, _ = streams("pipe")
    command = [
        *(sys.executable, "-m", "megaback", "tokenizer", "train"),
        *("--source", tiny_text_folder, "--out", tmp_path, "--vocab-size", "600"),
    ]
    result = subprocess.run(command, stdout=output, stderr=output, check=False, timeout=60)
    os.close(output)
    assert result.returncode == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        "tokenizer.model",
        "tokenizer_report.json",
    }
