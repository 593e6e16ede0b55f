"""Rendezvous of ranks: the narrowest address that works, and an unpredictable port."""

import os
import socket
from collections import Counter

import pytest

from data_pipeline.errors import LaunchError
from megaback.distributed.rendezvous import listen, name_rank, ranks_per_node

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_TASKS_PER_NODE": "2",
    "SLURM_STEP_NODELIST": "n1",
    "SLURM_STEP_LAUNCHER_PORT": "40001",
    "SLURM_SRUN_COMM_PORT": "40002",
}


def meeting_of(monkeypatch: pytest.MonkeyPatch, **more: str) -> tuple[str, int]:
    """Address and port at which a task of a step connects to the others."""
    with monkeypatch.context() as patch:
        for name in NAMES:
            patch.setenv(name, "")  # so that later changes are undone
            patch.delenv(name)
        for name, value in (STEP | more).items():
            patch.setenv(name, value)
        name_rank()
        return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


@pytest.mark.parametrize(
    ("address", "host"), [("127.0.0.1", "127.0.0.1"), ("localhost", "127.0.0.1"), ("::1", "::1")]
)
def test_the_store_listens_on_a_loopback_address_only(address: str, host: str) -> None:
    with listen(address, 0) as listening:
        assert listening.getsockname()[0] == host


@pytest.mark.parametrize("address", ["some-node", "203.0.113.9"])
def test_for_a_name_or_a_foreign_address_the_store_listens_on_all_interfaces(address: str) -> None:
    with listen(address, 0) as listening:
        port = listening.getsockname()[1]
        assert listening.getsockname()[0] in ("::", "0.0.0.0")
        socket.create_connection(("127.0.0.1", port)).close()


def test_a_port_in_use_is_reported() -> None:
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(LaunchError, match=rf"cannot listen on port {port} .* set MASTER_PORT"):
            listen("127.0.0.1", port)


def test_tasks_of_one_node_connect_on_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    assert meeting_of(monkeypatch)[0] == "127.0.0.1"
    several = {"SLURM_STEP_NODELIST": "n[1-2]", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}
    assert meeting_of(monkeypatch, **several)[0] == "n1"


def test_the_port_of_a_step_does_not_follow_from_its_ids(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    of_other_steps = {
        meeting_of(monkeypatch, SLURM_SRUN_COMM_PORT=str(port))[1] for port in range(40_000, 40_100)
    }
    assert len(of_other_steps) > 90
    assert all(10_000 <= port < 30_000 for port in of_other_steps)
    assert meeting_of(monkeypatch) == meeting_of(monkeypatch, SLURM_PROCID="0", SLURM_LOCALID="0")
    assert meeting_of(monkeypatch, MASTER_PORT="1234")[1] == 1234
    steps = Counter(meeting_of(monkeypatch, SLURM_STEP_ID=str(step))[1] for step in range(50))
    assert max(steps.values()) == 1


@pytest.mark.parametrize("value", ["", "0", "-2", "two"])
def test_a_rank_that_does_not_know_the_number_on_its_node_is_refused(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_SIZE", value)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)

    with pytest.raises(LaunchError, match=r"rank 3 does not know how many ranks .*set LOCAL_SIZE"):
        ranks_per_node()
