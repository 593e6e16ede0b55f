"""Losses of settings, and their noise over seeds."""

import math
from pathlib import Path
from typing import Any

import pytest

from megaback.faults.exit_record import record_event
from tests.helpers.sweeps import write_run
from tools.sweeps.record import Record
from tools.sweeps.result import SweepResult, result_of

RATE, SEED = "optimizer.learning_rate", "training.seed"


def sweep(
    out: Path, runs: dict[tuple[float, int], tuple[float | None, ...] | int | None], **config: Any
) -> SweepResult:
    """The result of runs by rate and seed: val losses, or an exit code, or None for no run."""
    values = {}
    for number, ((rate, seed), ending) in enumerate(runs.items()):
        values[f"run-{number}"] = {RATE: rate, SEED: seed}
        if isinstance(ending, int):
            write_run(out / f"run-{number}", code=ending)
        elif ending is not None:
            write_run(out / f"run-{number}", *ending)
    return result_of(Record((RATE, SEED), config, values), out)


def test_a_setting_has_the_mean_and_standard_error_of_its_seeds(tmp_path: Path) -> None:
    result = sweep(
        tmp_path,
        {(0.1, 0): (9.0, 3.0), (0.2, 0): (2.0,), (0.1, 1): (3.2,), (0.2, 1): (2.4,)},
    )

    best, other = result.settings
    assert (result.best, best.values) == (best, {RATE: 0.2})
    assert best.losses == {0: 2.0, 1: 2.4}
    assert best.loss == pytest.approx(2.2)
    assert best.error == pytest.approx(math.sqrt(0.08) / math.sqrt(2))
    difference, error = other.above(best) or (0.0, None)
    assert difference == pytest.approx(0.9)  # 1.0 and 0.8, by seed
    assert error == pytest.approx(math.sqrt(0.02) / math.sqrt(2))
    assert result.to_json()["settings"][1]["above_best"] == pytest.approx(0.9)


def test_one_seed_has_no_error(tmp_path: Path) -> None:
    result = sweep(tmp_path, {(0.1, 0): (3.0,), (0.2, 0): (2.0,)})

    assert [one.error for one in result.settings] == [None, None]
    assert result.to_json()["settings"][1]["above_best_error"] is None


def test_the_best_is_one_of_those_with_most_seeds(tmp_path: Path) -> None:
    result = sweep(tmp_path, {(0.1, 0): (3.0,), (0.2, 0): (2.0,), (0.1, 1): (3.2,), (0.2, 1): None})

    assert result.best is not None
    assert result.best.values == {RATE: 0.1}
    assert [one.num_unfinished for one in result.settings] == [1, 0]


def test_a_setting_of_which_a_run_diverged_is_last(tmp_path: Path) -> None:
    result = sweep(
        tmp_path,
        {(0.3, 0): (1.0,), (0.3, 1): 50, (0.1, 0): (3.0,), (0.2, 0): (None,), (0.1, 1): 75},
    )

    assert [one.values[RATE] for one in result.settings] == [0.1, 0.3, 0.2]
    assert [one.num_diverged for one in result.settings] == [0, 1, 1]
    assert result.settings[1].loss is None
    states = [run.state for run in result.runs]
    assert states == ["finished", "diverged", "finished", "diverged", "stopped"]
    assert [run.is_over for run in result.runs] == [True, True, True, True, False]


def test_a_run_that_is_non_finite_to_its_end_has_diverged(tmp_path: Path) -> None:
    write_run(tmp_path / "a", 7.0, skipped="the gradient norm is nan", loss=None)
    write_run(tmp_path / "b", 7.0, skipped="the loss is a spike", loss=None)
    values = {"a": {RATE: 1.0}, "b": {RATE: 0.1}}

    result = result_of(Record((RATE,), {}, values), tmp_path)

    assert [run.state for run in result.runs] == ["diverged", "finished"]
    assert [run.loss for run in result.runs] == [None, 7.0]


def test_with_early_stopping_the_lowest_loss_counts(tmp_path: Path) -> None:
    runs = {(0.1, 0): (3.0, 2.5, 4.0)}

    assert sweep(tmp_path / "last", runs).settings[0].loss == 4.0
    stopped = sweep(tmp_path / "lowest", runs, validation={"patience": 2})
    assert stopped.settings[0].loss == 2.5


def test_without_a_val_set_the_training_loss_counts(tmp_path: Path) -> None:
    result = sweep(tmp_path, {(0.1, 0): ()})

    assert (result.kind, result.settings[0].loss) == ("training", 5.0)


def test_a_job_that_has_not_started_its_ranks_is_no_dead_run(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    record_event(tmp_path / "a", "job", step=0)

    (run,) = result_of(Record((RATE,), {}, {"a": {RATE: 1.0}}), tmp_path).runs

    assert run.state == "not started"
