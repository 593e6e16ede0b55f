"""A process that is forked from the template is what an ordinary start would be."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from megaback.distributed.visible_devices import count_devices
from tests.helpers import warm_start
from tests.helpers.paths import ROOT
from tests.helpers.warm_start import COLD_VARIABLE

pytestmark = pytest.mark.skipif(
    bool(count_devices()) or COLD_VARIABLE in os.environ, reason="no warm starts here"
)

COMMAND = [sys.executable, "-m", "tests.helpers.process_facts"]


def facts_of(
    *words: str, command: list[str] = COMMAND, variables: dict[str, str] | None = None, **how: Any
) -> list[dict[str, Any]]:
    """Facts that a process prints, and those that its own process prints after it."""
    options = {"cwd": ROOT, "input": "", "env": {**os.environ, **(variables or {})}, **how}
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=True, **options)
    assert done.stderr == "a comment\n" * done.stdout.count("\n")
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize(
    ("command", "options"),
    [
        (COMMAND, {}),
        (COMMAND, {"input": "two\nlines", "start_new_session": True}),
        (COMMAND, {"variables": {"PYTHONUNBUFFERED": "1", "OTHER": "\udcff é"}}),
        (COMMAND, {"variables": {"PYTHONUNBUFFERED": ""}}),
        ([sys.executable, "-P", *COMMAND[1:]], {}),
    ],
)
def test_a_warm_process_has_the_circumstances_of_an_ordinary_one(
    command: list[str], options: dict[str, Any]
) -> None:
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        cold_options = options | {"variables": {**options.get("variables", {}), COLD_VARIABLE: "1"}}
        (warm,) = facts_of("exit", "0", "ö", command=command, **options)
        (cold,) = facts_of("exit", "0", "ö", command=command, **cold_options)
    finally:
        signal.signal(signal.SIGHUP, ignored)
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    assert (warm.pop("is_warm"), cold.pop("is_warm")) == (True, False)
    assert warm.pop("pid") != cold.pop("pid")
    assert warm == cold
    assert warm["parent"] == os.getpid()


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["exit", "7"], 7, "a comment\n"),
        (["fail"], 1, "RuntimeError: as asked\n"),
    ],
)
def test_a_warm_process_ends_as_an_ordinary_one(words: list[str], code: int, said: str) -> None:
    done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, cwd=ROOT, input="")
    assert done.returncode == code
    assert done.stderr.endswith(said)
    assert json.loads(done.stdout)["is_warm"]


def test_processes_of_a_warm_process_are_warm_and_its_children() -> None:
    first, second = facts_of("start")
    assert second["is_warm"]
    assert second["parent"] == first["pid"]


def test_a_worker_of_a_warm_process_has_the_circumstances_of_an_ordinary_one() -> None:
    (first, warm), (_, cold) = (
        facts_of("work", variables=variables) for variables in ({}, {COLD_VARIABLE: "1"})
    )

    assert (warm.pop("is_warm"), cold.pop("is_warm")) == (True, False)
    assert warm.pop("parent") == first["pid"] != cold.pop("parent")
    for facts in (warm, cold):
        del facts["pid"]
        # The numbers of the pipes to its parent are in its words.
        facts["shown_words"] = re.sub(r"=\d+", "", facts["shown_words"])
        facts["original_words"] = [re.sub(r"=\d+", "", word) for word in facts["original_words"]]
    assert warm == cold


def test_a_template_that_a_worker_needed_first_serves_later_commands(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`multiprocessing` has PYTHONSAFEPATH in the environment while it starts a worker."""
    ours, theirs = socket.socketpair()
    with ours, theirs, monkeypatch.context() as patch:
        patch.setenv("PYTHONSAFEPATH", "1")
        template = warm_start._Template(ours)
    assert template.circumstances == warm_start._circumstances(os.environ)


def test_a_killed_process_takes_its_template_with_it() -> None:
    with subprocess.Popen(
        [*COMMAND, "wait"], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, cwd=ROOT
    ) as process:
        assert process.stdout is not None
        assert json.loads(process.stdout.readline())["is_warm"]
        (template,) = psutil.Process(process.pid).children()
        assert "tests.helpers.warm_template" in template.cmdline()
        process.kill()
        assert process.wait(60) == -signal.SIGKILL
    give_up = time.monotonic() + 60
    while template.is_running() and template.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < give_up
        time.sleep(0.01)


@pytest.mark.parametrize(
    "options",
    [
        {"variables": {"PYTHONHASHSEED": "1"}},
        {"variables": {"OMP_NUM_THREADS": "3"}},
        {"variables": {"LC_ALL": "C"}},
        {"preexec_fn": os.setsid},
        {"process_group": 0} if sys.version_info >= (3, 11) else {"umask": 0o77},
        {"umask": 0o77},
    ],
)
def test_a_start_that_could_see_a_difference_is_an_ordinary_one(options: dict[str, Any]) -> None:
    (facts,) = facts_of(**options)
    assert not facts["is_warm"]


def test_a_missing_folder_or_module_is_the_ordinary_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="absent"):
        subprocess.run(COMMAND, cwd=tmp_path / "absent")
    words = [sys.executable, "-m", "tests.helpers.absent"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 1
    assert "No module named tests.helpers.absent" in done.stderr
