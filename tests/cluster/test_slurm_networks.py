"""A node that is cut off from the network: its rank lives on while the job is requeued."""

from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest

from megaback.faults.exit_record import read_exit, read_history
from tests.helpers.small_cluster import (
    NUM_STEPS,
    Slurm,
    cpu_options,
    held,
    last_step,
    read_log,
    running_cluster,
    wait_for,
    why_no_cluster,
    why_no_networks,
)
from tests.helpers.tiny_run import metrics_of

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
_TAG = "mb"


@pytest.fixture
def networks() -> Iterator[Slurm]:
    """Three nodes, each with a network of its own; Slurm soon notices that one is cut off."""
    reason = why_no_cluster() or why_no_networks()
    if reason:
        pytest.skip(reason)
    with running_cluster(
        MINISLURM_NET="netns",
        MINISLURM_TAG=_TAG,
        MINISLURM_NODES=3,
        MINISLURM_SLURMD_TIMEOUT=4,
        MINISLURM_KILLWAIT=2,
    ) as cluster:
        yield cluster


def test_a_rank_that_is_cut_off_ends_when_its_requeued_job_starts_elsewhere(
    networks: Slurm, write_config: Callable[..., Path], undisturbed: Path, tmp_path: Path
) -> None:
    # By its timeouts the rank would live on for five minutes.
    timeouts = {"heartbeat_s": 1, "step_timeout_s": 300, "silence_timeout_s": 300}
    hardware = {"device": "cpu", "preflight": "off", **timeouts}
    config = write_config(tmp_path, hardware=hardware, checkpoint={"every_steps": 5})
    run = tmp_path / "run"
    job_id = networks.submit("train.sbatch", config, cwd=tmp_path, options=cpu_options())

    def log() -> str:
        return read_log(tmp_path, job_id)

    def starts() -> list[str]:
        return [line["host"] for line in read_history(run) if line["event"] == "start"]

    wait_for(lambda: last_step(run) >= 7, 120, log)
    with held(config) as ranks:
        networks.command("ip", "link", "set", f"{_TAG}-v1", "down")
        (lone,) = (rank for rank in ranks if rank.environ()["SLURM_PROCID"] == "0")
    wait_for(lambda: len(starts()) == 2, 120, log)
    psutil.wait_procs([lone], timeout=30)
    # The older start's batch script, which Slurm then ends, must not requeue the job again.
    networks.command("ip", "link", "set", f"{_TAG}-v1", "up")
    job = networks.require_completed(job_id, tmp_path)

    assert not lone.is_running()
    assert starts() == ["n1", "n2"]
    assert (job["Restarts"], job["NodeList"]) == ("1", "n[2-3]")
    assert "a newer start of this run has begun on n2" in log()
    assert last_step(run) == NUM_STEPS
    assert metrics_of(run) == metrics_of(undisturbed)
    assert [line["event"] for line in read_history(run)] == ["job", "start", "job", "start", "exit"]
    assert (read_exit(run) or {})["code"] == 0
