"""A Slurm job is requeued while it makes progress, and exits as its ranks did."""

from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.errors import ConfigError, LaunchError, PreflightError, SupersededError
from launcher.slurm.job import (
    LIMIT_VARIABLE,
    MAX_STARTS_WITHOUT_PROGRESS,
    main,
    nodes_to_replace,
    num_failures,
    requeue_limit,
    true_code,
    why_requeue,
)
from megaback.faults.exit_record import record_event, record_exit, record_start
from tests.helpers.run_config import run_config

JOB = "77"
LOST, SAVED, KILLED_BY_USR1 = 51, 75, 138
ABORTED, BLOCKED, KILLED = 134, 142, 137


@pytest.fixture(autouse=True)
def in_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", JOB)


def start(run: Path, step: int) -> None:
    """Record a start of the job at a checkpoint."""
    save(run, step)
    record_event(run, "job", step=step)


def save(run: Path, step: int) -> None:
    folder = run / f"checkpoints/step-{step:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "meta.json").touch()


def is_requeued(
    run: Path, code: int, *, near: bool = False, restarts: int = 0, limit: int = 20
) -> bool:
    return why_requeue(run, JOB, restarts, limit, code, near)[0]


@pytest.mark.parametrize("code", [SAVED, KILLED_BY_USR1, LOST])
def test_a_job_with_a_newer_checkpoint_is_requeued(tmp_path: Path, code: int) -> None:
    for step in range(0, 100, 10):
        start(tmp_path, step)
        save(tmp_path, step + 10)
        assert is_requeued(tmp_path, code, near=True)


@pytest.mark.parametrize("code", [SAVED, KILLED_BY_USR1, LOST])
def test_a_job_without_progress_is_requeued_only_twice(tmp_path: Path, code: int) -> None:
    answers = []
    for _ in range(MAX_STARTS_WITHOUT_PROGRESS):
        start(tmp_path, 40)
        answers.append(is_requeued(tmp_path, code, near=True))
    assert answers == [True] * (MAX_STARTS_WITHOUT_PROGRESS - 1) + [False]
    _, sentence = why_requeue(tmp_path, JOB, 2, 20, code, True)
    assert sentence is not None
    assert "3 times at step 40" in sentence


def test_bad_nodes_are_replaced_only_on_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start(tmp_path, 0)
    (tmp_path / "bad_nodes.txt").write_text("n3\nn7\n")
    assert nodes_to_replace(tmp_path) == []
    assert not is_requeued(tmp_path, PreflightError.exit_code)

    monkeypatch.setenv("MEGABACK_REPLACE_BAD_NODES", "1")
    bad_nodes = nodes_to_replace(tmp_path)
    assert bad_nodes == ["n3", "n7"]
    is_wanted, sentence = why_requeue(
        tmp_path, JOB, 0, 20, PreflightError.exit_code, False, bad_nodes
    )
    assert is_wanted
    assert sentence is not None
    assert sentence.startswith("excluding n3, n7")
    assert not why_requeue(tmp_path, JOB, 0, 20, 31, False, bad_nodes)[0]
    assert nodes_to_replace(tmp_path / "elsewhere") == []


def test_the_end_of_an_older_start_of_the_job_requeues_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its node was cut off, and Slurm has started the job again elsewhere."""
    calls = tmp_path / "calls"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$*" >>{calls}\necho JobState=RUNNING\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    config = run_config(tmp_path / "run")
    config.run.mkdir()
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    for restarts in (0, 1):
        record_event(config.run, "job", step=restarts, restarts=restarts)

    def end(restarts: int) -> Result:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        return CliRunner().invoke(main, ["end", "--step-code", str(LOST), str(path)])

    older = end(0)
    assert older.exit_code == SupersededError.exit_code
    assert "start 1 of this job has ended, and a newer one has begun" in older.output
    assert not calls.exists()
    assert end(1).exit_code == LOST
    assert f"requeue {JOB}" in calls.read_text()


def test_starts_of_an_earlier_job_do_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    for _ in range(5):
        start(tmp_path, 40)
    monkeypatch.setenv("SLURM_JOB_ID", JOB)
    start(tmp_path, 40)
    assert is_requeued(tmp_path, SAVED, near=True)


@given(code=st.integers(0, 255))
@example(code=BLOCKED)
def test_before_the_limit_only_a_lost_rank_requeues_a_job(
    tmp_path_factory: pytest.TempPathFactory, code: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    start(run, 0)
    save(run, 10)
    assert is_requeued(run, code) is (code in (LOST, ABORTED, BLOCKED, KILLED))


@given(code=st.integers(1, 128))
def test_an_error_at_the_time_limit_does_not_requeue_the_job(
    tmp_path_factory: pytest.TempPathFactory, code: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    start(run, 0)
    save(run, 10)
    assert is_requeued(run, code, near=True) is (code in (LOST, SAVED))


@given(st.lists(st.booleans(), max_size=12), st.integers(0, 5))
def test_the_limit_counts_losses_and_not_requested_restarts(
    tmp_path_factory: pytest.TempPathFactory, losses: list[bool], limit: int
) -> None:
    run = tmp_path_factory.mktemp("run")
    for restarts, was_lost in enumerate(losses):
        assert num_failures(run, JOB, restarts) == sum(losses[:restarts])
        start(run, restarts)
        record_start(run, step=restarts)
        save(run, restarts + 1)
        record_exit(run, LOST if was_lost else SAVED, "kind", "reason")
        wanted = is_requeued(
            run, LOST if was_lost else SAVED, near=not was_lost, restarts=restarts, limit=limit
        )
        assert wanted is (not was_lost or sum(losses[:restarts]) < limit)


def test_the_exit_code_is_that_recorded_by_the_ranks_of_this_start(tmp_path: Path) -> None:
    record_exit(tmp_path, 31, "ShardCorruptError", "of an earlier start")
    start(tmp_path, 0)
    assert true_code(tmp_path, JOB, 137) == 137
    record_start(tmp_path, step=0)
    record_exit(tmp_path, LOST, "RankLostError", "rank 1 is dead")
    assert true_code(tmp_path, JOB, 143) == LOST


@pytest.mark.parametrize("text", ["", "-1", "many", "1.5"])
def test_an_invalid_limit_is_refused(monkeypatch: pytest.MonkeyPatch, text: str) -> None:
    monkeypatch.setenv(LIMIT_VARIABLE, text)
    with pytest.raises(ConfigError, match=LIMIT_VARIABLE):
        requeue_limit()


def test_the_command_is_refused_outside_slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID")
    with pytest.raises(SystemExit) as caught:
        main(["begin", "any.yaml"], standalone_mode=False)
    assert caught.value.code == LaunchError.exit_code


def test_a_secret_on_the_command_line_of_sbatch_is_refused(tmp_path: Path) -> None:
    done = CliRunner().invoke(
        main, ["begin", str(tmp_path / "c.yaml"), "data.shards=https://me:pass@host/x?sig=abc"]
    )
    assert done.exit_code == ConfigError.exit_code
    assert "data.shards=https://host/x: this address has a secret" in done.output
    assert "export it as MEGABACK_SECRET_NAME before sbatch" in done.output
    assert "abc" not in done.output
