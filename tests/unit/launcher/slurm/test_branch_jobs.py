"""Jobs of a run and of the branches of its horizons: their order, and none left after a failure."""

from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import LaunchError
from launcher.slurm import branch_jobs as module
from launcher.slurm.branch_jobs import RunJobs, branch_jobs, queue_tree
from launcher.slurm.commands import Submission
from launcher.slurm.stages import train_file
from megaback.config import Config
from tests.helpers.run_config import run_config

WSD = {
    "learning_rate": 1e-3,
    "warmup_steps": 1,
    "schedule": "wsd",
    "decay_fraction": 0.5,
    "decay_at": [4e5, 8e5],
}


@pytest.fixture
def sbatch_file(tmp_path: Path) -> Path:
    path = tmp_path / "train.sbatch"
    path.write_text("#!/bin/bash\n")
    return path


@pytest.fixture
def trunk(tmp_path: Path) -> Config:
    fields: dict[str, Any] = run_config(tmp_path / "run").model_dump(mode="json")
    fields |= {"optimizer": WSD, "training": {"steps": None, "precision": "fp32"}}
    return Config.model_validate(fields | {"init_from": str(tmp_path / "base")})


@pytest.fixture
def tree(trunk: Config, sbatch_file: Path) -> tuple[RunJobs, list[RunJobs]]:
    def submissions(*stages: str) -> list[Submission]:
        file = str(sbatch_file)
        return [
            Submission(stage=stage, variables={}, options=(), file=file, arguments=())
            for stage in stages
        ]

    branches = branch_jobs(trunk, lambda *_: submissions("train", "convert"))
    snapshot = trunk.run / "submitted/now"
    return RunJobs(trunk, snapshot, tuple(submissions("data", "train", "convert"))), branches


def test_a_branch_has_a_config_of_its_own(
    trunk: Config, tree: tuple[RunJobs, list[RunJobs]]
) -> None:
    first, _ = (branch.config for branch in tree[1])

    assert first.run == trunk.run / "branches/4e5"
    assert first.branch_from is not None
    assert first.branch_from.parent == trunk.run / "checkpoints"
    assert (first.optimizer.decay_at, first.init_from) == (None, None)
    assert (train_file(trunk), train_file(first)) == ("finetune.sbatch", "train.sbatch")


def test_branches_follow_the_training_job(
    tree: tuple[RunJobs, list[RunJobs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[Submission] = []

    def queue(submission: Submission) -> str:
        queued.append(submission)
        return str(len(queued))

    monkeypatch.setattr(module, "queue", queue)
    jobs = queue_tree(*tree, [])

    assert jobs == [["1", "2", "3"], ["4", "5"], ["6", "7"]]
    before = [
        next((option[-1] for option in one.options if "afterok" in option), "") for one in queued
    ]
    assert before == ["", "1", "2", "2", "4", "2", "6"]
    for run in (tree[0], *tree[1]):
        assert (run.snapshot / "config.yaml").read_text() == run.config.to_yaml()
        assert (run.snapshot / "train.sbatch").is_file()
        assert (run.snapshot / "submission.json").is_file()


def test_a_refused_branch_leaves_no_job_and_no_folder(
    tree: tuple[RunJobs, list[RunJobs]], monkeypatch: pytest.MonkeyPatch
) -> None:
    queued: list[str] = []
    canceled: list[str] = []

    def queue(_: Submission) -> str:
        if len(queued) == 6:
            raise LaunchError("Slurm refuses it")
        queued.append(str(len(queued)))
        return queued[-1]

    monkeypatch.setattr(module, "queue", queue)
    monkeypatch.setattr(module, "cancel", canceled.append)
    with pytest.raises(LaunchError):
        queue_tree(*tree, [])

    assert sorted(canceled) == queued
    assert not tree[0].config.run.exists()
