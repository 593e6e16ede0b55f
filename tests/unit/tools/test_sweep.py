"""`megaback sweep`: its runs, what it refuses, and how it resumes; without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from data_pipeline.errors import (
    CheckpointMissingError,
    ConfigError,
    LaunchError,
    MegabackError,
    OutputExistsError,
    RunMismatchError,
    ShardsMissingError,
)
from tests.helpers.sweeps import FakeTrain
from tests.helpers.tiny_run import tiny_config
from tools.artifacts import inspect
from tools.sweep import main
from tools.sweeps import training

RATES, SEEDS = "optimizer.learning_rate=1e-3,1e-2", "training.seed=0,1"
Sweep = Callable[..., Result]


@pytest.fixture
def config(tmp_path: Path, tiny_shards: Path) -> Path:
    path = tmp_path / "config.yaml"
    fields = tiny_config(tiny_shards) | {"run": str(tmp_path / "run")}
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "run-sweep"


@pytest.fixture
def train(monkeypatch: pytest.MonkeyPatch) -> FakeTrain:
    fake = FakeTrain(lambda rate, seed: 3 - rate + seed / 10)
    monkeypatch.setattr(training, "train", fake)
    return fake


@pytest.fixture
def sweep(config: Path, train: FakeTrain) -> Sweep:
    """`sweep(*words)`: the command on the config."""
    return lambda *words: CliRunner().invoke(main, [str(config), *map(str, words)])


def record_of(out: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((out / "sweep.json").read_text())
    return fields


def assert_refused(result: Result, kind: type[MegabackError], *words: str) -> None:
    assert result.exit_code == kind.exit_code, result.output
    assert len(result.output.strip().splitlines()) == 1
    for word in words:
        assert word in result.output


def test_all_combinations_are_trained_and_compared(
    sweep: Sweep, train: FakeTrain, out: Path
) -> None:
    result = sweep(RATES, SEEDS)

    assert result.exit_code == 0, result.output
    rates = ("0.001", "0.01")
    assert train.started == [f"learning_rate-{r}_seed-{s}" for s in (0, 1) for r in rates]
    best, other = record_of(out)["settings"]
    assert best["values"] == {"optimizer.learning_rate": 0.01}
    assert best["seeds"] == {"0": pytest.approx(2.99), "1": pytest.approx(3.09)}
    assert other["above_best"] == pytest.approx(0.009)
    assert (out / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert "The best has learning_rate 0.01: 3.0400 +- 0.0500 nats/token." in result.output
    shown = CliRunner().invoke(main, [str(out), "--json"])
    assert json.loads(shown.output)["settings"] == record_of(out)["settings"]
    found = inspect(out, verify=False)
    assert (found.kind, found.facts["summary"][:19]) == ("sweep", "4 runs: 4 finished.")


def test_a_failed_run_is_reported_and_retried_and_does_not_end_the_sweep(
    sweep: Sweep, train: FakeTrain, out: Path
) -> None:
    failed, diverged = "learning_rate-0.001_seed-0", "learning_rate-0.01_seed-0"
    train.codes = {failed: LaunchError.exit_code, diverged: 50}

    first = sweep(RATES, SEEDS)
    train.codes, train.started = {}, []
    second = sweep("optimizer.learning_rate=0.001,0.01", SEEDS)

    assert first.exit_code == LaunchError.exit_code
    assert f"{failed}: stopped: exit code 13" in first.output
    assert second.exit_code == 0, second.output
    assert train.started == [failed]
    assert [one["diverged"] for one in record_of(out)["settings"]] == [0, 1]
    assert "diverged: 1 of 2" in second.output


def test_after_a_request_to_stop_no_other_run_starts(
    sweep: Sweep, train: FakeTrain, out: Path
) -> None:
    train.codes = {"learning_rate-0.001_seed-0": 75}

    result = sweep(RATES, SEEDS)

    assert result.exit_code == 75
    assert len(train.started) == 1
    assert "4 runs: 1 stopped, 3 not started." in result.output
    states = [run["state"] for run in record_of(out)["runs"]]
    assert states == ["stopped", *["not started"] * 3]


def test_more_values_are_added_to_a_sweep(sweep: Sweep, train: FakeTrain, out: Path) -> None:
    sweep(RATES, SEEDS)
    train.started = []

    result = sweep("optimizer.learning_rate=1e-1,1e-2", "training.seed=1,2")

    assert result.exit_code == 0, result.output
    assert train.started == [
        *("learning_rate-0.1_seed-1", "learning_rate-0.1_seed-2", "learning_rate-0.01_seed-2")
    ]
    assert len(record_of(out)["runs"]) == 7


def test_the_same_keys_in_another_order_are_the_same_runs(sweep: Sweep, out: Path) -> None:
    assert sweep(RATES, SEEDS).exit_code == 0

    again = sweep(SEEDS, RATES)

    assert again.exit_code == 0, again.output
    assert "4 runs: 4 finished." in again.output
    assert len(record_of(out)["runs"]) == 4


def test_a_changed_config_is_refused_by_name(sweep: Sweep, out: Path, tmp_path: Path) -> None:
    sweep(RATES, SEEDS)
    before = (out / "sweep.json").read_bytes()

    changed = sweep("optimizer.learning_rate=1,2", SEEDS, "batch.global_batch_rows=16")
    assert_refused(changed, RunMismatchError, "batch.global_batch_rows = 8, and the config has 16")
    assert_refused(sweep(RATES), RunMismatchError, "learning_rate, training.seed, and this one")
    assert (out / "sweep.json").read_bytes() == before
    assert sweep(RATES, SEEDS, "logging.every_steps=7").exit_code == 0
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "notes").touch()
    foreign = sweep(RATES, "--out", tmp_path / "other")
    assert_refused(foreign, OutputExistsError, "not the folder of a sweep")


@pytest.mark.parametrize(
    ("words", "kind", "message"),
    [
        (("optimizer.learning_rat=1,2",), ConfigError, "did you mean optimizer.learning_rate?"),
        (("optimizer.learning_rate=1,-2",), ConfigError, "optimizer.learning_rate = -2"),
        (("optimizer.learning_rate=1e-3,0.001",), ConfigError, "two runs are learning_rate-0.001"),
        (("model.width=32,33",), ConfigError, "num_heads 4 does not divide width 33"),
        (("data.shards=none,other",), ShardsMissingError, "none"),
        (
            (RATES, "optimizer.schedule=wsd", "optimizer.decay_at=[2e4]", "training.steps=null"),
            ConfigError,
            "decay_at makes several models",
        ),
        (("training.seed=3",), ConfigError, "no key has a list of values"),
        ((RATES, "--zip", "model.width,optimizer.learning_rate"), ConfigError, "model.width="),
        ((RATES, "--x-axis", "training.steps"), ConfigError, "--x-axis training.steps"),
        ((RATES, "--partition", "gpu"), ConfigError, "--partition needs --slurm"),
        ((RATES, "--slurm", "--save-before", "1h"), ConfigError, "remove --slurm"),
        ((RATES, "--json"), ConfigError, "its folder in place"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_starts(
    words: tuple[str, ...],
    kind: type[MegabackError],
    message: str,
    sweep: Sweep,
    train: FakeTrain,
    out: Path,
) -> None:
    assert_refused(sweep(*words), kind, message)
    assert train.started == []
    assert not out.exists()


def test_a_dry_run_lists_the_runs_and_their_cost(sweep: Sweep, train: FakeTrain, out: Path) -> None:
    result = sweep("model.width=32,64", "--dry-run", "hardware.peak_flops=1e9")

    assert result.exit_code == 0, result.output
    _, small, large, total, *_ = (line.split() for line in result.output.splitlines())
    assert (small[0], large[0]) == ("width-32", "width-64")
    tokens = 100 * 8 * 64
    assert int(small[4].replace(",", "")) == tokens
    assert int(total[3].replace(",", "")) == 2 * tokens
    assert float(large[5]) > 2 * float(small[5]) > 0
    assert float(large[6]) == pytest.approx(float(large[5]) * 1e15 / 0.4e9 / 3600, abs=0.01)
    assert "assume an MFU of 40%: --mfu sets another" in result.output
    slower = sweep("model.width=32,64", "--dry-run", "hardware.peak_flops=1e9", "--mfu", "0.1")
    assert float(slower.output.splitlines()[2].split()[6]) == pytest.approx(
        4 * float(large[6]), abs=0.04
    )
    assert (train.started, out.exists()) == ([], False)


def test_another_folder_is_not_a_sweep(config: Path) -> None:
    assert_refused(
        CliRunner().invoke(main, [str(config.parent)]), CheckpointMissingError, "no sweep.json"
    )
