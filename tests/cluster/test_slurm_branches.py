"""`megaback submit` with `optimizer.decay_at`: jobs of branches follow the job of their trunk."""

from collections.abc import Callable
from pathlib import Path

import pytest

from megaback.tracking.metrics import read_metrics
from megaback.tracking.run_progress import jobs_of
from megaback.weights.model_folder import read_description
from tests.helpers.small_cluster import SMALL_JOB, Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]
HORIZON = {
    "learning_rate": 3e-3,
    "warmup_steps": 1,
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "decay_at": [2048],
}
"""A decay from step 2 to 4, of 512 tokens per step."""


def test_a_branch_follows_the_job_of_its_trunk_and_is_converted(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    run, out = tmp_path / "run", tmp_path / "model"
    config = write_config(tmp_path, optimizer=HORIZON, training={"precision": "fp32"})
    words = ("submit", config, *SMALL_JOB, "--chain=train,convert", "--out", out)
    said = slurm.megaback(*words, cwd=tmp_path)
    branch = run / "branches/2.048e3"
    for folder in (run, branch):
        assert [*jobs_of(folder).values()] == ["train", "convert"]
        for job in jobs_of(folder):
            slurm.require_completed(job, folder / "logs")

    assert "train of branch 2.048e3: job " in said
    assert [max(line["step"] for line in read_metrics(one)) for one in (run, branch)] == [2, 4]
    assert read_description(out).step == 2
    assert read_description(tmp_path / "model-2.048e3").step == 4
