"""Ctrl-C: every command ends with one message and code 130, and the next run is not obstructed.

Interrupts are sent to the process group, as a terminal does, and to the first process alone, as
`kill -INT` does; one, or two in a row.
"""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from data_pipeline.common import interrupts
from data_pipeline.common.command import Command
from megaback.cli import command_modules
from tests.helpers.interrupting import hearing_ctrl_c

SEED = 25
# Interrupts this process while a module is imported.
_INTERRUPT_AT_IMPORT = """
import os, signal, sys
class Interrupter:
    def find_spec(self, name, *_):
        if name == os.environ.get("INTERRUPT_AT"):
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupter())
"""


def start(*words: Any, **environment: str) -> "subprocess.Popen[str]":
    """Start a command in a new process group."""
    return subprocess.Popen(
        [sys.executable, "-m", "megaback", *map(str, words)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
        start_new_session=True,
        preexec_fn=hearing_ctrl_c,
    )


def require_interrupted(process: "subprocess.Popen[str]") -> None:
    output, said = process.communicate(timeout=60)
    assert (process.returncode, output) == (130, ""), said
    assert said.splitlines()[:1] in (
        ["megaback: interrupted"],
        ["megaback: interrupted; run the same command to resume"],
    )
    assert said.count("\n") == 1, said
    assert not list(group_of(process.pid))


def group_of(pid: int) -> "list[psutil.Process]":
    """The living processes of a group."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getpgid(process.pid) == pid and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found


@pytest.fixture
def interrupting_imports(tmp_path: Path) -> Callable[[str], dict[str, str]]:
    """`interrupting_imports(module)`: environment of a process interrupted at that import."""
    (tmp_path / "site").mkdir()
    (tmp_path / "site" / "sitecustomize.py").write_text(_INTERRUPT_AT_IMPORT)
    path = os.pathsep.join([str(tmp_path / "site"), os.environ.get("PYTHONPATH", "")])
    return lambda module: {"PYTHONPATH": path, "INTERRUPT_AT": module}


@pytest.mark.parametrize(
    ("words", "module"),
    [
        *((words, module) for words, module in command_modules().items()),
        ("train", "click"),
        ("shards build", "zstandard"),
    ],
)
def test_a_command_interrupted_while_it_loads_reports_it(
    words: str, module: str, interrupting_imports: Callable[[str], dict[str, str]]
) -> None:
    require_interrupted(start(*words.split(), "--help", **interrupting_imports(module)))


@pytest.mark.parametrize("command", ["convert", "sample", "score"])
def test_a_command_interrupted_while_it_loads_torch_reports_it(
    command: str, tmp_path: Path, interrupting_imports: Callable[[str], dict[str, str]]
) -> None:
    """For commands that import it only once they work."""
    options = {
        "convert": ["--out", tmp_path / "out"],
        "sample": ["--ending", "it."],
        "score": ["--in", "-", "--out", "-"],
    }
    process = start(command, tmp_path / "model", *options[command], **interrupting_imports("torch"))
    require_interrupted(process)
    assert [path.name for path in tmp_path.iterdir()] == ["site"]


@dataclass(frozen=True)
class Building:
    """A build that takes a while, and its folder."""

    source: Path
    tokenizer: Path
    out: Path

    def start(self) -> "subprocess.Popen[str]":
        return start(
            *("shards", "build", "--source", self.source, "--tokenizer", self.tokenizer),
            *("--out", self.out, "--tasks", 8, "--workers", 2),
        )

    def wait_for(self, moment: str, process: "subprocess.Popen[str]") -> None:
        """Return when a build has finished a task."""
        give_up = time.monotonic() + 60
        while not self._is_at(moment) and process.poll() is None:
            assert time.monotonic() < give_up
            time.sleep(0.001)

    def _is_at(self, moment: str) -> bool:
        if moment == "workers start":
            return (self.out / "plan.json").exists()
        return any(self.out.glob("*.zst")) or any(self.out.glob(".*.partial"))


@pytest.fixture(scope="module")
def large_source(tmp_path_factory: pytest.TempPathFactory, english_documents: list[str]) -> Path:
    folder = tmp_path_factory.mktemp("source")
    generator = random.Random(SEED)
    for number in range(8):
        texts = generator.choices(english_documents, k=1000)
        lines = [json.dumps({"text": f"{text} {number}"}) + "\n" for text in texts]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


@pytest.mark.parametrize(("whom", "times"), [("group", 1), ("parent", 2), ("group", 2)])
@pytest.mark.parametrize("moment", ["workers start", "tasks run"])
def test_an_interrupted_build_ends_immediately_and_can_be_resumed(
    moment: str, whom: str, times: int, large_source: Path, tokenizer_path: Path, tmp_path: Path
) -> None:
    building = Building(large_source, tokenizer_path, tmp_path / "shards")
    process = building.start()
    building.wait_for(moment, process)
    for _ in range(times):
        if process.poll() is None:
            (os.killpg if whom == "group" else os.kill)(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=30)

    assert process.returncode in (0, 130), said  # it may have finished
    assert said.count("\n") <= times
    assert "Traceback" not in said
    names = {path.name for path in building.out.glob("*")}
    assert "plan.json" in names or not any(name.endswith(".zst") for name in names), names
    give_up = time.monotonic() + 10
    while group_of(process.pid):
        assert time.monotonic() < give_up
        time.sleep(0.01)
    if (moment, whom, times) == ("tasks run", "group", 2):
        resumed = building.start()
        _, said = resumed.communicate(timeout=60)
        assert resumed.returncode == 0, said


def test_an_interrupted_tokenizer_is_not_waited_for(tmp_path: Path) -> None:
    """SentencePiece trains for long without returning to Python."""
    generator, source = random.Random(SEED), tmp_path / "words.txt"
    letters = "".join(generator.choices("abcdefghijklmnopqrstuvwxyz ", k=10_000_000))
    source.write_text("\n".join(letters[at : at + 1000] for at in range(0, len(letters), 1000)))
    process = start(
        *("tokenizer", "train", "--source", source, "--out", tmp_path / "tokenizer"),
        *("--vocab-size", 100_000, "--sample-bytes", 1 << 30),
    )
    time.sleep(1)
    process.send_signal(signal.SIGINT)
    require_interrupted(process)
    assert not (tmp_path / "tokenizer" / "tokenizer.model").exists()


def test_a_second_interrupt_does_not_wait_for_the_clean_up() -> None:
    code = """
import os, signal, sys, time
from data_pipeline.common.command import Command
import click
@click.command(cls=Command)
def main():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(60)
    finally:
        print("tidying up", flush=True)
        time.sleep(60)
main()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=hearing_ctrl_c,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "tidying up\n"
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert (process.returncode, said) == (
        130,
        "megaback: interrupted; second signal, exited immediately\n",
    )


def test_a_command_called_by_a_program_raises_keyboard_interrupt() -> None:
    """The program's signal handlers are unchanged."""
    before = signal.getsignal(signal.SIGINT)

    def interrupted() -> None:
        raise KeyboardInterrupt

    result = CliRunner().invoke(Command("work", callback=interrupted), [])
    assert (result.exit_code, result.stderr) == (130, "megaback: interrupted\n")
    assert signal.getsignal(signal.SIGINT) is before


def test_deferred_signals_arrive_after_the_critical_section() -> None:
    done: list[str] = []

    def receive(*_: object) -> None:
        done.append("signal")

    before = signal.signal(signal.SIGINT, receive)
    try:
        with interrupts.signals_deferred():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.01)
            done.append("work")
        assert done == ["work", "signal"]
    finally:
        signal.signal(signal.SIGINT, before)
