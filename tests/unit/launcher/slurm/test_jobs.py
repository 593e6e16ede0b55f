"""`megaback jobs` and `submit`: state of a run from its folder, chains and allocations."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import CheckpointMissingError, ConfigError, OutputExistsError
from launcher.slurm.jobs import Row, find_runs, rows_of_run, table
from launcher.slurm.snapshot import new_folder, record_jobs, remove_snapshot, write_snapshot
from launcher.slurm.stages import check_model_folder, choose_allocation, parse_chain
from megaback.config import Config
from megaback.config_file import load_config
from megaback.faults.exit_record import record_event, record_exit, record_start
from megaback.run_folder import CONFIG_COPY_NAME, holds_weights, newest_checkpoint_step
from megaback.tracking.run_progress import jobs_of, read_progress
from tests.helpers.paths import ROOT


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run's empty folder, on a machine without Slurm."""
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = tmp_path / "runs/one"
    folder.mkdir(parents=True)
    return folder


def write_metrics(run: Path, steps: int, tail: str = "") -> None:
    lines = [
        json.dumps({"step": step, "loss": 5.0 - step / 1000, "step_s": 2.0})
        for step in range(1, steps + 1)
    ]
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + tail)


@pytest.mark.parametrize("steps", [1, 10, 5000])
@pytest.mark.parametrize("tail", ["", '{"step": 99', "\n"])
def test_progress_is_read_from_the_end_of_the_metrics(run: Path, steps: int, tail: str) -> None:
    write_metrics(run, steps, tail)
    progress = read_progress(run)
    assert progress is not None
    assert (progress.step, progress.loss) == (steps, 5.0 - steps / 1000)


def test_there_is_no_progress_before_the_first_step(run: Path) -> None:
    assert read_progress(run) is None
    write_metrics(run, 0)
    assert read_progress(run) is None
    assert newest_checkpoint_step(run) == 0


def test_a_checkpoint_counts_when_it_is_complete(run: Path) -> None:
    for name in ("step-00000100", "step-00000200", "rolled-back-from-00000300"):
        (run / "checkpoints" / name).mkdir(parents=True)
    (run / "checkpoints/step-00000100/meta.json").touch()
    (run / "checkpoints/rolled-back-from-00000300/meta.json").touch()
    assert newest_checkpoint_step(run) == 100


def test_jobs_are_those_of_the_history_and_of_submissions(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    record_event(run, "job", step=0)
    monkeypatch.delenv("SLURM_JOB_ID")
    record_start(run, step=0)
    (run / "submitted/1").mkdir(parents=True)
    record_jobs(run / "submitted/1", {}, [{"stage": "data", "job": "10", "line": ""}])
    (run / "submitted/2").mkdir()
    (run / "submitted/2/submission.json").write_text('{"jobs": [{"sta')  # truncated
    assert jobs_of(run) == {"9": "train", "10": "data"}


def test_the_end_of_a_run_is_shown_if_slurm_has_forgotten_its_jobs(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "9")
    record_start(run, step=0, total_steps=200)
    write_metrics(run, 100)
    record_exit(run, 51, "RankLostError", "rank 1 is dead")
    (row,) = rows_of_run(run)
    assert (row.job, row.state, row.why) == ("9", "stopped (51)", "rank 1 is dead")
    assert (row.step, row.total_steps, row.to_train_s) == (100, 200, 200.0)


def test_a_run_without_slurm_is_shown_too(run: Path) -> None:
    record_start(run, step=0, total_steps=100)
    write_metrics(run, 100)
    record_exit(run, 0, "finished", "trained to the end")
    (row,) = rows_of_run(run)
    assert (row.job, row.state, row.to_train_s, row.why) == (None, "finished", None, None)


def test_runs_are_found_by_their_own_or_a_parent_folder(run: Path, tmp_path: Path) -> None:
    record_start(run, step=0)
    (run.parent / "no run").mkdir()
    directions = [tmp_path / "arrow" / "seed-0" / name for name in ("backward", "forward")]
    for folder in directions:
        (folder / "copy").mkdir(parents=True)
        record_start(folder, step=0)
        record_start(folder / "copy", step=0)  # within a run, no runs are searched
    assert find_runs([tmp_path / "arrow"]) == find_runs([tmp_path / "arrow" / "seed-0"])
    assert find_runs([tmp_path / "arrow"]) == directions
    assert find_runs([run]) == find_runs([run.parent]) == [run]
    with pytest.raises(CheckpointMissingError, match="has no run"):
        find_runs([run.parent / "no run", run.parent / "absent"])


@given(st.lists(st.tuples(st.text("ab c", max_size=9), st.integers(0, 10**9)), min_size=1))
def test_the_table_is_aligned_with_its_header(
    values: list[tuple[str, int]],
) -> None:
    rows = [
        Row(
            run=name,
            job=None,
            stage=None,
            state="running",
            restarts=0,
            step=step,
            total_steps=None,
            loss=None,
            to_train_s=None,
            job_left_s=None,
            nodes=None,
            why=None,
        )
        for name, step in values
    ]
    head, *lines = table(rows).splitlines()
    assert len(lines) == len(rows)
    column = head.index("STEP")
    assert [line[column:].split()[0] for line in lines] == [f"{step:,}" for _, step in values]


def test_a_removed_snapshot_leaves_only_other_files(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    config = _config(f"run={run}")
    folder = new_folder(run)
    fields = write_snapshot(folder, config, [ROOT / "slurm/train.sbatch"])
    assert load_config(folder / CONFIG_COPY_NAME) == config
    assert fields["code"]["megaback"]
    assert new_folder(run) != folder
    remove_snapshot(folder)
    assert not run.exists()
    write_snapshot(folder, config, [])
    record_start(run, step=0)
    remove_snapshot(folder)
    assert [path.name for path in run.iterdir()] == ["history.jsonl"]


@pytest.mark.parametrize("text", ["train", "data,train", "train,convert", "data, train,convert"])
def test_a_chain_may_be_a_part_of_the_pipeline(text: str) -> None:
    assert parse_chain(text) == tuple(part.strip() for part in text.split(","))


@pytest.mark.parametrize("text", ["", "data", "data,convert", "train,data", "train,train", "tune"])
def test_a_chain_in_another_order_is_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="--chain"):
        parse_chain(text)


def test_gpus_are_requested_unless_the_config_wants_none() -> None:
    file = ROOT / "slurm/train.sbatch"
    cuda, cpu = _config("hardware.device=cuda"), _config("hardware.device=cpu")
    auto = _config("hardware.device=auto")
    shapes = {
        (config.hardware.device, devices, flag): choose_allocation(config, file, 2, devices, flag)
        for config, devices, flag in [(cuda, None, None), (auto, 4, True), (cpu, 3, None)]
    }
    assert [(a.num_ranks, a.gpus_per_node) for a in shapes.values()] == [(16, None), (8, 4), (6, 0)]
    assert choose_allocation(auto, file, 1, 2, False).gpus_per_node == 0
    with pytest.raises(ConfigError, match="--cpu was given; give --gpus"):
        choose_allocation(cuda, file, 1, None, False)


def test_the_models_folder_must_be_named_and_empty(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="needs --out"):
        check_model_folder(None)
    assert check_model_folder(tmp_path / "absent") == tmp_path / "absent"
    (tmp_path / "file").touch()
    with pytest.raises(OutputExistsError):
        check_model_folder(tmp_path)


def _config(*overrides: str) -> Config:
    return load_config(ROOT / "configs/demo.yaml", overrides)


def test_init_from_is_a_model_folder_a_run_or_a_checkpoint(run: Path) -> None:
    assert not holds_weights(run)
    assert not holds_weights(run / "absent")
    checkpoint = run / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    assert not holds_weights(run)
    (checkpoint / "meta.json").write_text("{}")
    (run / "checkpoints" / "best").write_text(checkpoint.name)
    model = run / "model"
    model.mkdir()
    (model / "config.json").write_text("{}")
    for base in (run, run / "checkpoints", checkpoint, run / "checkpoints" / "best", model):
        assert holds_weights(base)
    assert not holds_weights(model / "config.json")
