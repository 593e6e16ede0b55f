"""Peak memory: of a process, and of a GPU by PyTorch's counters, which are made up here."""

import subprocess
import sys

import pytest
import torch

from megaback.rehearsal.memory_meter import MemoryMeter
from tests.helpers.paths import ROOT

_PROCESS = """
import torch
from megaback.rehearsal.memory_meter import MemoryMeter
torch.ones(1)
meter = MemoryMeter.of(torch.device("cpu"))
torch.ones(25_000_000)
torch.ones(1_000_000)
meter.wait()
print(meter.peak_bytes())
"""


def test_the_peak_of_a_process_is_counted_from_its_start() -> None:
    done = subprocess.run(
        [sys.executable, "-c", _PROCESS], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert int(done.stdout) == pytest.approx(100e6, rel=0.05)


def test_the_peak_of_a_gpu_is_that_of_its_allocator(monkeypatch: pytest.MonkeyPatch) -> None:
    device = torch.device("cuda", 0)
    asked: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", asked.append)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda _: 10)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 70)
    monkeypatch.setattr(torch.cuda, "synchronize", asked.append)
    meter = MemoryMeter.of(device)
    meter.wait()
    assert meter.peak_bytes() == 60
    assert asked == [device, device]
