"""`megaback train` with horizons: which runs are skipped, as they are finished."""

import json
from pathlib import Path

import pytest

import launcher.train
from launcher.train import train_with_branches
from megaback.config_file import load_config
from megaback.faults.exit_record import record_exit
from megaback.horizons import branch_overrides, horizons_of
from megaback.run_folder import CHECKPOINTS_FOLDER, META_NAME, step_name
from tests.helpers.run_config import run_config


@pytest.fixture
def config(tmp_path: Path) -> Path:
    optimizer = {"learning_rate": 1e-3, "schedule": "wsd", "decay_at": [10 * 4 * 64]}
    path = tmp_path / "config.yaml"
    path.write_text(run_config(tmp_path / "run", optimizer=optimizer, training={}).to_yaml())
    return path


@pytest.fixture
def finished(config: Path) -> Path:
    """Files of a trunk and its branch that have been trained to their ends."""
    trunk = load_config(config)
    branch = load_config(config, branch_overrides(trunk, horizons_of(trunk)[0]))
    for run in (trunk, branch):
        folder = run.run / CHECKPOINTS_FOLDER / step_name(run.training.steps or 0)
        folder.mkdir(parents=True)
        (folder / META_NAME).write_text(json.dumps({"config": run.model_dump(mode="json")}))
        record_exit(run.run, 0, "finished", "trained to the end")
    return trunk.run


@pytest.mark.parametrize(
    ("overrides", "is_started"),
    [((), False), (("data.shards=other",), True), (("training.seed=3",), True)],
)
def test_a_finished_run_is_skipped_only_with_the_config_that_it_was_trained_with(
    overrides: tuple[str, ...],
    is_started: bool,
    config: Path,
    finished: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    started = []
    monkeypatch.setattr(launcher.train, "train", lambda *given: started.append(given) or 0)

    train_with_branches(config, overrides)

    assert len(started) == (2 if is_started else 0)


def test_finished_runs_are_skipped_in_a_folder_that_was_moved(
    config: Path, finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved = finished.rename(finished.with_name("moved"))
    monkeypatch.setattr(launcher.train, "train", lambda *_: pytest.fail("a run was started"))

    assert train_with_branches(config, (f"run={moved}",))[0] == 0
