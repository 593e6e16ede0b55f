"""A rank's dump of torch's flight recorder: real ranks, and dumps that never end."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from megaback.faults import flight_recorder
from megaback.faults.collective_record import describe_hang, read_collectives
from megaback.faults.flight_recorder import dump_collectives
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment

FACTS = {"rank": 0, "world_size": 2, "start": None}
DUMP = "_dump_fr_trace_json"


def test_the_collective_that_a_real_rank_waits_in_is_named(tmp_path: Path) -> None:
    subprocess.run(
        [sys.executable, "-m", "tests.helpers.hanging_ranks", str(tmp_path)],
        env={**training_environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        cwd=ROOT,
        check=True,
        timeout=100,
    )
    records = read_collectives(tmp_path, "0" * 12)

    said = describe_hang(records) or ""

    assert [record.rank for record in records] == [0, 1]
    assert said.startswith("rank 0 waited in gloo:all_reduce of Double 2 (number ")
    assert "(control messages)) for 0 s, which rank 1 has not entered (in " in said


@pytest.mark.parametrize("text", [b'{"entries": [], "pg_config": {}}', b"{", b'{"entries": [3]}'])
def test_nothing_is_dumped_without_entries_or_in_another_format(
    monkeypatch: pytest.MonkeyPatch, text: bytes
) -> None:
    monkeypatch.setattr(torch._C._distributed_c10d, DUMP, lambda: text)

    assert dump_collectives(**FACTS) is None


def test_a_dump_that_takes_too_long_is_abandoned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch._C._distributed_c10d, DUMP, lambda: time.sleep(2))
    monkeypatch.setattr(flight_recorder, "MAX_DUMP_S", 0.1)

    assert dump_collectives(**FACTS) is None


_STUCK = """
import ctypes, torch
from megaback.faults import flight_recorder
usleep = ctypes.PyDLL(None).usleep  # it keeps the interpreter
torch._C._distributed_c10d._dump_fr_trace_json = lambda: usleep(int(MICROSECONDS))
flight_recorder.MAX_DUMP_S = 0.2
flight_recorder.dump_collectives(rank=0, world_size=2, start=None)
"""


def test_a_dump_that_blocks_the_interpreter_ends_the_process() -> None:
    started = time.monotonic()

    assert _blocked_for(60_000_000) == -signal.SIGALRM
    assert time.monotonic() - started < 40


def test_a_rank_without_cpu_for_a_while_survives_its_dump() -> None:
    assert _blocked_for(800_000) == 0


def _blocked_for(microseconds: int) -> int:
    """Exit code of a process whose dump, of at most 0.2 s, blocks the interpreter for so long."""
    code = _STUCK.replace("MICROSECONDS", str(microseconds))
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=False, timeout=50
    ).returncode
