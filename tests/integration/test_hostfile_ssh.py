"""Ranks of two hosts over a real ssh: started, signaled, waited for, never orphaned."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import LaunchError
from launcher.ranks.local import CONNECTION_LOST
from tests.helpers.paths import ROOT
from tests.helpers.private_sshd import HOSTS, PrivateSshd, private_sshd
from tests.helpers.tiny_run import training_environment, wait_for_step

pytestmark = pytest.mark.slow

_LAUNCH = """
import json, sys
from pathlib import Path
from launcher.ranks.hostfile import read_hostfile, run_on_hosts
hosts = read_hostfile(Path(sys.argv[1]))
print(json.dumps(run_on_hosts(hosts, [sys.executable, *sys.argv[2:]])))
"""
# Writes its rank to a file, and exits as its argument says.
_RANK = """
import json, os, signal, sys, time
rank = os.environ["RANK"]
received = []
for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
    signal.signal(number, lambda number, frame: received.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
fields = {"arguments": sys.argv[2:], "environment": dict(os.environ), "pid": os.getpid()}
with open(f"partial-{rank}", "w") as file:
    json.dump(fields, file)
os.rename(f"partial-{rank}", f"rank-{rank}")
print(f"rank {rank} speaks", flush=True)
give_up = time.monotonic() + 60
while sys.argv[1] == "wait" and not received and time.monotonic() < give_up:
    print(".", flush=True, file=sys.stderr)
    time.sleep(0.05)
if sys.argv[1] == "die" and rank == "1":
    os.kill(os.getpid(), signal.SIGKILL)
with open(f"end-{rank}", "w") as file:
    json.dump(received, file)
sys.exit(75 if received else 0)
"""
Launch = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture(scope="module")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrivateSshd]:
    with private_sshd(tmp_path_factory.mktemp("sshd")) as server:
        yield server


@pytest.fixture(scope="module")
def hostfile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("hosts") / "hosts"
    path.write_text("".join(f"{host} slots=1\n" for host in HOSTS))
    return path


@pytest.fixture
def launch(tmp_path: Path, sshd: PrivateSshd, hostfile: Path) -> Launch:
    """`launch(action, *arguments)`: a launcher of small ranks in a folder called `it's here`."""
    folder = tmp_path / "it's here"
    folder.mkdir()

    def launch(*arguments: str, hosts: Path = hostfile) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [sys.executable, "-c", _LAUNCH, hosts, "-c", _RANK, *arguments],
            cwd=folder,
            env={**training_environment(), **sshd.environment, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    return launch


def wait_for(*paths: Path) -> list[Any]:
    """Contents of the files, once they are complete."""
    give_up = time.monotonic() + 60
    found: list[Any] = []
    while len(found) < len(paths):
        assert time.monotonic() < give_up, f"{paths} are not there"
        time.sleep(0.02)
        found = [json.loads(path.read_text() or "null") for path in paths if path.exists()]
    return found


def outcome(launcher: "subprocess.Popen[str]") -> tuple[Any, str]:
    """Exit code of the launcher, and the output of the ranks."""
    printed, errors = launcher.communicate(timeout=60)
    *before, last = printed.splitlines()
    assert launcher.returncode == 0, errors
    return json.loads(last), "\n".join(before)


def test_ranks_of_other_hosts_get_every_argument_without_a_shell_expanding_it(
    tmp_path: Path, launch: Launch
) -> None:
    evil = ["a b", "$(touch pwned)", "; touch pwned", "'\"\\", "* ~", "umlaut ü"]
    result, printed = outcome(launch("end", *evil))

    codes, hosts, signals = result
    assert (codes, sorted(hosts), signals) == ([0, 0], sorted(HOSTS), [])
    assert sorted(printed.splitlines()) == ["rank 0 speaks", "rank 1 speaks"]
    ranks = wait_for(*(tmp_path / "it's here" / f"rank-{rank}" for rank in range(2)))
    for host, rank in zip(HOSTS, ranks, strict=True):
        assert rank["arguments"] == evil
        assert rank["environment"]["MEGABACK_HOST"] == host
        assert rank["environment"]["WORLD_SIZE"] == "2"
    assert not list(tmp_path.rglob("pwned"))


def test_a_killed_rank_is_reported_with_its_host(launch: Launch) -> None:
    codes, hosts, _ = outcome(launch("die"))[0]

    assert dict(zip(hosts, codes, strict=True)) == {HOSTS[0]: 0, HOSTS[1]: -signal.SIGKILL}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1], ids=lambda n: n.name)
def test_a_signal_reaches_the_ranks_of_every_host_once(
    number: signal.Signals, tmp_path: Path, launch: Launch
) -> None:
    launcher = launch("wait")
    folder = tmp_path / "it's here"
    wait_for(folder / "rank-0", folder / "rank-1")
    launcher.send_signal(number)

    codes, _, signals = outcome(launcher)[0]
    assert (codes, signals) == ([75, 75], [number])
    assert wait_for(folder / "end-0", folder / "end-1") == [[number], [number]]


@pytest.mark.parametrize("what", ["launcher", "connections"])
def test_ranks_save_when_their_launcher_or_connection_is_gone(
    what: str, tmp_path: Path, launch: Launch, sshd: PrivateSshd
) -> None:
    launcher = launch("wait")
    folder = tmp_path / "it's here"
    wait_for(folder / "rank-0", folder / "rank-1")
    if what == "launcher":
        launcher.kill()
        launcher.communicate()
    else:
        for pid in sshd.connections():
            os.kill(pid, signal.SIGKILL)
        assert outcome(launcher)[0][0] == [CONNECTION_LOST, CONNECTION_LOST]

    assert wait_for(folder / "end-0", folder / "end-1") == [[signal.SIGTERM]] * 2


def test_an_unreachable_host_is_named(tmp_path: Path, sshd: PrivateSshd, config_path: Path) -> None:
    hosts = tmp_path / "hosts"
    hosts.write_text("no-such-host.invalid slots=2\n")
    run = subprocess.run(
        [sys.executable, "-m", "megaback", "train", "--hostfile", hosts, config_path],
        cwd=tmp_path,
        env={**training_environment(), **sshd.environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )

    assert run.returncode == LaunchError.exit_code
    assert "megaback: error: ssh could not connect to no-such-host.invalid" in run.stderr


def test_a_run_on_two_hosts_is_checked_saves_at_a_signal_and_resumes_under_deepspeed(
    tmp_path: Path, sshd: PrivateSshd, hostfile: Path, config_path: Path
) -> None:
    run = tmp_path / "run"
    words = [config_path, f"run={run}", "validation.every_steps=100000"]
    endless = "training.steps=100000"
    environment = {**training_environment(), **sshd.environment, "DS_ACCELERATOR": "cpu"}
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "megaback", "train", "--hostfile", hostfile, *words, endless],
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            text=True,
        )
    wait_for_step(process, run, 1, output)
    process.send_signal(signal.SIGTERM)
    exit_code = process.wait(timeout=60)
    printed = output.read_text()

    assert exit_code == 75, printed
    saved = int(sorted((run / "checkpoints").glob("step-*"))[-1].name[5:])
    assert f"asked to stop after {saved} steps, all of them saved" in printed
    report = json.loads((run / "preflight.json").read_text())
    assert [rank["node"] for rank in report["ranks"]] == list(HOSTS)

    if shutil.which("pdsh") is None:
        pytest.skip("there is no pdsh, which the deepspeed command needs for a hostfile")
    options = ["--master_addr", "127.0.0.1", "--module", "megaback.train", *words]
    options.append(f"training.steps={saved + 2}")
    deepspeed = subprocess.run(
        [Path(sys.executable).with_name("deepspeed"), "-q", "--hostfile", hostfile, *options],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert deepspeed.returncode == 0, deepspeed.stdout + deepspeed.stderr
    assert f"resuming from step {saved}" in deepspeed.stdout
    assert json.loads((run / "exit.json").read_text())["code"] == 0
