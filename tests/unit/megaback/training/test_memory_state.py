"""Files about the memory of a rank that ran out of it; CUDA's answers are made up."""

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from megaback.training import memory_state
from megaback.training.memory_state import record_memory_history, write_memory_state

GPU = torch.device("cuda", 1)
SNAPSHOT = {"segments": [{"address": 1, "blocks": []}], "device_traces": [[]]}


@pytest.fixture(autouse=True)
def _cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "memory_summary", lambda device: f"summary of {device}")
    monkeypatch.setattr(torch.cuda.memory, "_snapshot", lambda _device: SNAPSHOT)


def test_summary_and_snapshot_are_written(tmp_path: Path) -> None:
    text, snapshot = write_memory_state(tmp_path, 3, GPU)

    assert text == tmp_path / "memory" / "rank-00003.txt"
    assert text.read_text() == "summary of cuda:1\n"
    assert snapshot == tmp_path / "memory" / "rank-00003.pickle"
    assert pickle.loads(snapshot.read_bytes()) == SNAPSHOT


def test_nothing_is_written_for_a_cpu(tmp_path: Path) -> None:
    assert write_memory_state(tmp_path, 0, torch.device("cpu")) == []
    assert list(tmp_path.iterdir()) == []


def test_a_snapshot_that_is_too_large_is_not_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(memory_state, "_MAX_SNAPSHOT_BYTES", 10)

    assert [path.suffix for path in write_memory_state(tmp_path, 0, GPU)] == [".txt"]
    assert [path.name for path in (tmp_path / "memory").iterdir()] == ["rank-00000.txt"]


def test_failures_are_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_device: torch.device) -> Any:
        raise torch.OutOfMemoryError("again")

    monkeypatch.setattr(torch.cuda, "memory_summary", fail)

    assert [path.suffix for path in write_memory_state(tmp_path, 0, GPU)] == [".pickle"]
    assert write_memory_state(tmp_path / "missing", 0, GPU) == []


def test_the_history_is_recorded_on_gpus_only(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[dict[str, object]] = []
    monkeypatch.setattr(
        torch.cuda.memory, "_record_memory_history", lambda **options: calls.append(options)
    )
    record_memory_history(torch.device("cpu"))
    assert not calls

    record_memory_history(GPU)

    assert calls == [{"max_entries": 100_000, "stacks": "python"}]
