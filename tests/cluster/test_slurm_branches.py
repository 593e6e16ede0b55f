"""`megaback submit` with `optimizer.decay_at`: jobs of branches follow the job of their trunk."""

import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megaback.faults.exit_record import read_history
from megaback.tracking.run_progress import jobs_of
from megaback.weights.model_folder import read_description
from tests.helpers.small_cluster import SMALL_JOB, Slurm, last_step, ranks_of, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
HORIZON = {
    "learning_rate": 3e-3,
    "warmup_steps": 1,
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "decay_at": [40960],
}
"""A decay from step 40 to 80, of 512 tokens per step."""


def test_a_branch_follows_the_job_of_its_trunk_resumes_when_killed_and_is_converted(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "model"
    often = {"every_steps": 5}
    config = write_config(
        tmp_path, optimizer=HORIZON, training={"precision": "fp32"}, checkpoint=often
    )
    words = ("submit", config, *SMALL_JOB, "--chain=train,convert", "--out", out)
    said = slurm.megaback(*words, cwd=tmp_path)
    branch = run / "branches/4.096e4"
    (snapshot,) = (branch / "submitted").iterdir()
    wait_for(lambda: last_step(branch) > 40, 120)
    for rank in ranks_of(snapshot / "config.yaml"):
        rank.send_signal(signal.SIGKILL)
    for folder in (run, branch):
        assert [*jobs_of(folder).values()] == ["train", "convert"]
        for job in jobs_of(folder):
            slurm.require_completed(job, folder / "logs")

    assert "train of branch 4.096e4: job " in said
    assert [last_step(one) for one in (run, branch)] == [40, 80]
    starts = [line for line in read_history(branch) if line["event"] == "start"]
    assert [line["job"] for line in starts] == [next(iter(jobs_of(branch)))] * 2
    assert starts[0]["step"] == 40
    assert read_description(out).step == 40
    assert read_description(tmp_path / "model-4.096e4").step == 80
