"""State that a test leaves in its process is found."""

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.helpers import process_state
from tests.helpers.process_state import changes, left_threads, running_threads


def _replace_linear(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(torch.nn.functional, "linear", torch.nn.functional.bilinear)


def _send_signals_elsewhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(signal, "getsignal", lambda _: signal.SIG_IGN)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda patch: patch.setenv("RANK", "3"), "variable RANK was None, is 3"),
        (lambda patch: patch.delenv("PATH"), f"variable PATH was {os.environ['PATH']}, is None"),
        (lambda patch: patch.chdir("/"), f"working directory was {Path.cwd()}, is /"),
        (lambda patch: patch.syspath_prepend("/other"), "sys.path was "),
        (lambda patch: patch.delitem(sys.modules, "json"), "module json was "),
        (_replace_linear, "torch.nn.functional.linear was "),
        (_send_signals_elsewhere, "handler of SIGHUP was "),
    ],
)
def test_what_is_changed_is_found(change: Callable[[pytest.MonkeyPatch], None], found: str) -> None:
    before = process_state.process_state()
    with pytest.MonkeyPatch.context() as patch:
        change(patch)
        assert any(line.startswith(found) for line in changes(before))

    assert changes(before) == []


def test_a_first_import_is_no_change(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "json")
    before = process_state.process_state()
    monkeypatch.undo()

    assert changes(before) == []


def test_only_a_thread_that_does_not_end_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    before, ends = running_threads(), threading.Event()
    thread = threading.Thread(target=ends.wait, name="one")
    thread.start()
    with monkeypatch.context() as patch:
        patch.setattr(process_state, "_WAIT_S", 0)
        assert left_threads(before) == ["thread one runs"]
    ends.set()

    assert left_threads(before) == []
