"""Training jobs that lose nodes and ranks, or make no progress."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megaback.faults.exit_record import read_history
from tests.helpers.small_cluster import (
    MINISLURM,
    Slurm,
    cpu_options,
    last_step,
    loads_torch,
    ranks_of,
    read_log,
    wait_for,
)

pytestmark = [pytest.mark.cluster, pytest.mark.slow]

_OTHER_VERSION_ON_N2 = """
import importlib.metadata, os
version = importlib.metadata.version
if os.environ.get("SLURMD_NODENAME") == "n2":
    importlib.metadata.version = lambda name: "0.1" if name == "flash-attn" else version(name)
"""


@pytest.mark.timeout(600)
def test_a_job_survives_as_many_lost_nodes_and_aborted_ranks_as_the_requeue_limit(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = write_config(
        tmp_path,
        training={"steps": 100_000, "precision": "fp32"},
        hardware={"device": "cpu", "heartbeat_s": 1, "step_timeout_s": 60},
        checkpoint={"every_steps": 5},
    )
    # Longer than this Slurm takes to notice a dead node, as in the shipped file.
    job_id = slurm.submit(
        "train.sbatch",
        config,
        cwd=tmp_path,
        options=cpu_options(),
        MEGABACK_WAIT_S=25,
        MEGABACK_REQUEUE_LIMIT=3,
    )

    def log() -> str:
        return read_log(tmp_path, job_id)

    def trains_in_start(number: int) -> bool:
        starts = [line for line in read_history(run) if line["event"] == "start"]
        return len(starts) == number and last_step(run) >= starts[-1]["step"] + 6

    try:
        wait_for(lambda: trains_in_start(1), 120, log)
        lost = _last_node(slurm, job_id)
        slurm.command("bash", MINISLURM, "crash", lost)
        slurm.command("bash", MINISLURM, "boot", lost)  # before Slurm notices
        wait_for(lambda: trains_in_start(2), 180, log)
        assert "the ranks ended with code 51 (srun: " in log() or "code 51: rank 1" in log()
        assert f"rank 1 ({lost}, process" in log()
        assert "a rank was lost; the newest checkpoint is of step" in log()

        lost = _last_node(slurm, job_id)
        slurm.command("bash", MINISLURM, "crash", lost)
        wait_for(lambda: trains_in_start(3), 180, log)
        assert lost not in slurm.command("scontrol", "show", "hostnames", _nodes(slurm, job_id))

        for rank in ranks_of(config):  # none is left to report it
            rank.send_signal(signal.SIGABRT)
        wait_for(lambda: trains_in_start(4), 180, log)
        assert "the ranks ended with code 134" in log()

        ranks_of(config)[0].send_signal(signal.SIGABRT)  # the other one reports it
        job = slurm.wait(job_id, tmp_path)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "51:0", "3")
        assert "is dead" in log() or "has written no heartbeat" in log()
        assert "requeued 3 times after such losses" in log()
        steps = [line["step"] for line in read_history(run) if line["event"] == "start"]
        assert steps == sorted(set(steps)), "every start resumes from a newer checkpoint"
    finally:
        slurm.command("bash", MINISLURM, "up")  # for the tests that follow


def test_a_bad_node_is_replaced_on_request(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    folder = tmp_path / "injected"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(_OTHER_VERSION_ON_N2)
    job_id = slurm.submit(
        "train.sbatch",
        write_config(tmp_path),
        "training.steps=3",
        cwd=tmp_path,
        options=f"{cpu_options()} --exclude=n4",
        PYTHONPATH=folder,
        MEGABACK_REPLACE_BAD_NODES=1,
    )

    job = slurm.require_completed(job_id, tmp_path)

    log = read_log(tmp_path, job_id)
    assert "node n2 has flash-attn 0.1, but the other nodes have none" in log
    assert "excluding n2; the newest checkpoint is of step 0" in log
    assert (job["Restarts"], job["NodeList"]) == ("1", "n[1,3]")


def test_an_error_of_one_rank_ends_the_job_with_its_reason_and_code(
    write_config: Callable[..., Path], slurm: Slurm, tiny_shards: Path, tmp_path: Path
) -> None:
    shards = tmp_path / "shards"
    shutil.copytree(tiny_shards, shards)
    shard = next(shards.glob("train-*.zst"))
    broken = bytearray(shard.read_bytes())
    broken[200] ^= 1  # in the first frame
    shard.write_bytes(broken)
    config = write_config(tmp_path)
    job_id = slurm.submit(
        "train.sbatch", config, f"data.shards={shards}", cwd=tmp_path, options=cpu_options()
    )
    job = slurm.wait(job_id, tmp_path)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "31:0", "0")
    log = read_log(tmp_path, job_id)
    assert "slurm: the ranks ended with code 31" in log
    assert log.count("megaback: error:") == 1
    assert str(shard) in log
    shown = slurm.megaback("jobs", tmp_path, cwd=tmp_path)
    assert "stopped (31)" in shown
    assert str(shard) in shown


def test_a_job_without_progress_is_requeued_only_twice(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    job_id = slurm.submit("train.sbatch", config, cwd=tmp_path, options=cpu_options(nodes=1))

    def log() -> str:
        return read_log(tmp_path, job_id)

    for start in range(1, 4):
        wait_for(lambda start=start: log().count("ranks on n") == start, 60, log)  # type: ignore[misc]
        # squeue lists a step before its tasks are launched, and until then srun drops signals. A
        # rank that loads torch has been launched, and has no signal handlers yet.
        wait_for(lambda: any(map(loads_torch, ranks_of(config))), 60, log)
        # Slurm sends USR1 to the script near the time limit.
        slurm.command("scancel", "--batch", "--signal=USR1", job_id)
        wait_for(lambda start=start: log().count("time limit near") == start, 60, log)  # type: ignore[misc]
    job = slurm.wait(job_id, tmp_path)
    assert (job["JobState"], job["Restarts"]) == ("FAILED", "2")
    assert "has started 3 times at step 0 without a newer checkpoint" in read_log(tmp_path, job_id)


def _nodes(slurm: Slurm, job_id: str) -> str:
    return slurm.job(job_id)["NodeList"]


def _last_node(slurm: Slurm, job_id: str) -> str:
    """A node other than that of the batch script."""
    return slurm.command("scontrol", "show", "hostnames", _nodes(slurm, job_id)).split()[-1]
