"""Ranks that are each alone on a host: hosts are namespaces of names, processes and mounts."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from data_pipeline.errors import PreemptedError, RankLostError
from launcher.ranks.local import rank_environment, rank_names
from megaback.faults.exit_record import read_exit
from megaback.faults.heartbeat import Heartbeat, read_heartbeat
from megaback.run_folder import METRICS_NAME, heartbeat_path
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment

pytestmark = pytest.mark.slow

_INJECTOR = ROOT / "tests" / "integration" / "faults" / "inject"
_HOST = ("unshare", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc", "bash", "-c")
_SILENCE_S = 2
_BLOCKED = {
    "at": "megaback.model.gpt:ReverseGPT.forward",
    "do": "sleep",
    "rank": 0,
    "call": 16,
    "when": "before",
    "training": True,
    "seconds": 600,
}
Ranks = list["subprocess.Popen[bytes]"]


@pytest.fixture
def start(tmp_path: Path, config_path: Path) -> Iterator[Callable[[object], Ranks]]:
    """`start(fault)`: two ranks on the hosts n0 and n1, which share only network and disk."""
    if subprocess.run([*_HOST, "true"], capture_output=True, check=False).returncode:
        pytest.skip("namespaces need root")
    ranks: Ranks = []

    def start(fault: object) -> Ranks:
        environment = {**training_environment(), **rank_environment(2)}
        environment |= {"PYTHONPATH": f"{_INJECTOR}:{ROOT}", "FAULT": json.dumps(fault)}
        command = [sys.executable, "-m", "megaback.train", config_path, f"run={tmp_path / 'run'}"]
        command += ["hardware.heartbeat_s=0.5", f"hardware.silence_timeout_s={_SILENCE_S}"]
        command += ["training.steps=100000", "hardware.step_timeout_s=600", "zero.stage=1"]
        command += ["hardware.preflight=off", "validation.every_steps=null"]
        for names in rank_names(2):
            script = f'hostname n{names["RANK"]} && exec "$@"'
            with (tmp_path / f"{names['RANK']}.txt").open("w") as output:
                ranks.append(
                    subprocess.Popen(
                        [*_HOST, script, "rank", *map(str, command)],
                        env=environment | names,
                        stdout=output,
                        stderr=subprocess.STDOUT,
                    )
                )
        return ranks

    yield start
    for rank in ranks:
        rank.kill()
        rank.wait()


def wait_until(condition: Callable[[], bool], ranks: Ranks, folder: Path) -> None:
    give_up = time.monotonic() + 120
    while not condition():
        printed = [path.read_text() for path in sorted(folder.glob("*.txt"))]
        assert all(rank.poll() is None for rank in ranks), printed
        assert time.monotonic() < give_up, printed
        time.sleep(0.05)


def beat_of(run: Path, rank: int) -> Heartbeat | None:
    return read_heartbeat(heartbeat_path(run, rank))


def test_a_rank_that_dies_alone_on_its_host_is_named_by_one_that_blocks(
    tmp_path: Path, start: Callable[[object], Ranks]
) -> None:
    run = tmp_path / "run"
    ranks = start(_BLOCKED)

    def is_blocked() -> bool:
        beat = beat_of(run, 0)
        return beat is not None and beat.step > 1 and beat.written - beat.since > 1

    wait_until(is_blocked, ranks, tmp_path)
    ranks[1].kill()

    assert ranks[0].wait(60) == RankLostError.exit_code  # not after 600 s
    ending = read_exit(run)
    assert ending is not None
    assert (ending["code"], ending["rank"]) == (RankLostError.exit_code, 0)
    assert ending["reason"].startswith("rank 1 (n1, process ")
    assert f"has written no heartbeat for {_SILENCE_S} s; it was at step" in ending["reason"]


def test_a_rank_that_cannot_write_its_heartbeat_does_not_end_a_healthy_run(
    tmp_path: Path, start: Callable[[object], Ranks]
) -> None:
    run = tmp_path / "run"
    ranks = start(None)
    wait_until((run / METRICS_NAME).exists, ranks, tmp_path)
    child = next(Path(f"/proc/{ranks[1].pid}/task/{ranks[1].pid}").glob("children")).read_text()
    heartbeats = run / "heartbeats"
    command = ["nsenter", "-t", child.split()[0], "-m", "mount", "--bind", "-o", "ro"]
    subprocess.run([*command, heartbeats, heartbeats], check=True)

    def is_long_silent() -> bool:
        mine, other = beat_of(run, 0), beat_of(run, 1)
        return (
            mine is not None
            and other is not None
            and (mine.written - other.written > 3 * _SILENCE_S)
        )

    wait_until(is_long_silent, ranks, tmp_path)
    os.kill(int(child.split()[0]), signal.SIGTERM)
    assert [rank.wait(60) for rank in ranks] == [PreemptedError.exit_code] * 2
