"""Training jobs on a real Slurm: alone, together, stopped and requeued."""

import json
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path

import pytest

from megaback.faults.exit_record import read_history
from megaback.tracking.metrics import MACHINE_FIELDS, read_metrics
from megaback.tracking.tracker import flat_values
from tests.helpers.small_cluster import (
    NUM_STEPS,
    REPOSITORY,
    FinishedRun,
    Slurm,
    cpu_options,
    held,
    last_step,
    read_log,
    wait_for,
)
from tests.helpers.tiny_run import metrics_of
from tests.helpers.wheel_environment import plant

_ENDLESS = {"steps": 100_000, "precision": "fp32"}
pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_a_run_on_two_nodes_has_the_losses_of_one_process(
    finished: FinishedRun, write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    subprocess.run(
        [sys.executable, "-m", "megaback.train", write_config(tmp_path)],
        env=slurm.environment,
        check=True,
        capture_output=True,
        timeout=120,
    )
    alone = read_metrics(tmp_path / "run")
    shared = read_metrics(finished.run)
    assert [line["step"] for line in shared if "loss" in line] == [*range(1, NUM_STEPS + 1)]
    assert [list(line) for line in shared] == [list(line) for line in alone]
    for of_shared, of_alone in zip(shared, alone, strict=True):
        assert of_shared["step"] == of_alone["step"]
        found, expected = (flat_values(line) for line in (of_shared, of_alone))
        for key in found.keys() - MACHINE_FIELDS:
            assert found[key] == pytest.approx(expected[key], abs=1e-4), (key, of_alone["step"])


def test_a_job_writes_only_its_log_and_its_run(finished: FinishedRun) -> None:
    log = next(finished.folder.glob("megaback-train-*.out"))
    written = {path for path in finished.folder.rglob("*") if path.is_file()}
    outside = {path for path in written if finished.run not in path.parents}
    assert outside == {log, finished.folder / "config.yaml"}
    elsewhere = [*finished.home.rglob("*"), *finished.temporary.rglob("*")]
    assert [path for path in elsewhere if path.is_file()] == []


def test_a_job_beside_modules_of_the_same_names_runs_the_installed_wheel_in_its_container(
    wheel_python: Path, write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    plant(tmp_path, "launcher", "tools", "data_pipeline", "torch")
    started, image = tmp_path / "started", tmp_path / "an image.sif"
    apptainer = tmp_path / "bin" / "apptainer"  # a stand-in that runs the command here
    apptainer.parent.mkdir()
    apptainer.write_text(f'#!/bin/bash\necho "$*" >>"{started}"\nshift 3\nexec "$@"\n')
    apptainer.chmod(0o755)
    config = write_config(tmp_path, training={"steps": 2, "precision": "fp32"})

    job_id = slurm.submit(
        "train.sbatch",
        config,
        cwd=tmp_path,
        options=cpu_options(nodes=1),
        MEGABACK_ENV=wheel_python.parents[1],
        PATH=f"{apptainer.parent}:{slurm.environment['PATH']}",
        MEGABACK_CONTAINER=image,
    )

    slurm.require_completed(job_id, tmp_path)
    assert last_step(tmp_path / "run") == 2
    command = f"exec --nv {image} python -m megaback.train {config}"
    assert started.read_text().splitlines() == [command]


@pytest.mark.timeout(600)
def test_a_job_at_its_time_limit_saves_and_resumes_with_the_same_metrics(
    undisturbed: Path, write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    # The ranks are frozen after a few steps until the signal has arrived, so that the result does
    # not depend on the machine's speed. The time limit is set while they are.
    config, run = write_config(tmp_path), tmp_path / "run"
    options = f"{cpu_options()} --signal=B:USR1@110"
    job_id = slurm.submit("train.sbatch", config, cwd=tmp_path, options=options)
    wait_for(lambda: last_step(run) >= 5, 280, lambda: read_log(tmp_path, job_id))
    with held(config) as ranks:
        started = datetime.fromisoformat(slurm.job(job_id)["StartTime"])
        ran_s = (datetime.now() - started).total_seconds()
        slurm.command(
            "scontrol", "update", f"JobId={job_id}", f"TimeLimit={-(-(ran_s + 55) // 60):.0f}"
        )
        row = json.loads(slurm.megaback("jobs", "--json", tmp_path, cwd=tmp_path))
        refused = slurm.attempt(
            *(sys.executable, "-m", "megaback", "submit", config, "--devices-per-node=1"),
            cwd=tmp_path,
        )
        wait_for(lambda: "passing a signal on" in read_log(tmp_path, job_id), 120)
    wait_for(lambda: "requeued" in read_log(tmp_path, job_id), 60)
    slurm.command("scontrol", "update", f"JobId={job_id}", "TimeLimit=10")
    job = slurm.require_completed(job_id, tmp_path)

    assert len(ranks) == 2
    assert int(job["Restarts"]) == 1
    log = read_log(tmp_path, job_id)
    assert "asked to stop after" in log
    saved = [
        json.loads(path.read_text())["step"]
        for path in (run / "checkpoints").glob("step-*/meta.json")
    ]
    assert len(saved) == 2
    assert 5 <= min(saved) < max(saved) == NUM_STEPS
    assert f"newest checkpoint is of step {min(saved)}, and the job is requeued" in log
    assert metrics_of(run) == metrics_of(undisturbed)

    assert (row["job"], row["state"], row["total_steps"]) == (job_id, "running", NUM_STEPS)
    assert 5 <= row["step"] < NUM_STEPS
    assert 0 < row["job_left_s"] <= 120
    assert row["nodes"] == job["NodeList"]
    assert refused.returncode == 13
    assert f"already has job {job_id} (train, running)" in refused.stderr


def test_two_runs_share_nodes_and_a_canceled_one_saves_and_is_not_requeued(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    # The first one runs for as long as the second one, so that they would collide on any port that
    # both used.
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    endless = slurm.submit(
        "train.sbatch",
        write_config(first, training=_ENDLESS),
        cwd=first,
        options=f"{cpu_options()} --nodelist=n[1-2]",
    )
    short = slurm.submit(
        "train.sbatch",
        *(write_config(second), "training.steps=3"),
        cwd=second,
        options=f"{cpu_options()} --nodelist=n[1-2]",
    )
    slurm.require_completed(short, second)
    wait_for(lambda: last_step(first / "run") >= 3, 120, lambda: read_log(first, endless))
    slurm.command("scancel", endless)
    job = slurm.wait(endless, first)
    wait_for(lambda: "asked to stop after" in read_log(first, endless), 30)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "and the job is requeued" not in read_log(first, endless)
    assert list((first / "run/checkpoints").glob("step-*/meta.json"))
    losses = [
        [line["loss"] for line in read_metrics(folder / "run") if "loss" in line][:3]
        for folder in (first, second)
    ]
    assert losses[0] == losses[1]  # the schedule is still in its warmup


def test_a_preempted_job_resumes_and_a_canceled_one_that_loses_a_rank_does_not(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    config, run = write_config(tmp_path, training=_ENDLESS), tmp_path / "run"
    victim = slurm.submit(
        "train.sbatch",
        config,
        cwd=tmp_path,
        options=f"{cpu_options(nodes=1, tasks_per_node=2)} --nodelist=n1 --exclusive",
    )
    wait_for(lambda: last_step(run) >= 3, 120, lambda: read_log(tmp_path, victim))
    other = slurm.command(
        *("sbatch", "--parsable", "--partition=high", "--nodelist=n1", "--exclusive"),
        *("--output=other.out", "--wrap=sleep 1"),
        cwd=tmp_path,
    ).strip()
    slurm.require_completed(other, tmp_path)
    wait_for(
        lambda: "resuming from step" in read_log(tmp_path, victim),
        120,
        lambda: read_log(tmp_path, victim),
    )
    resumed = last_step(run)
    wait_for(lambda: last_step(run) > resumed, 120, lambda: read_log(tmp_path, victim))
    job = slurm.job(victim)
    with held(config) as ranks:
        slurm.command("scancel", victim)
        ranks[1].kill()
    cancelled = slurm.wait(victim, tmp_path)
    wait_for(lambda: "Slurm itself ends the job" in read_log(tmp_path, victim), 30)
    assert (job["JobState"], job["Restarts"]) == ("RUNNING", "1")
    assert (cancelled["JobState"], cancelled["Restarts"]) == ("CANCELLED", "1")
    assert next(line["code"] for line in read_history(run) if line["event"] == "exit") == 75


def test_an_invalid_config_is_refused_before_the_ranks_start(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    wrong = {
        "train.sbatch": ("optimizer.learning_rat=1", "did you mean optimizer.learning_rate?"),
        "finetune.sbatch": ("training.steps=1", "has no init_from"),
    }
    jobs = {
        name: slurm.submit(name, config, override, cwd=tmp_path, options=cpu_options())
        for name, (override, _) in wrong.items()
    }
    for name, job_id in jobs.items():
        job = slurm.wait(job_id, tmp_path)
        assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "10:0", "0")
        assert wrong[name][1] in read_log(tmp_path, job_id)
    assert not (tmp_path / "run").exists()


def test_the_file_for_fine_tuning_trains_from_a_finished_run(
    finished: FinishedRun, write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    words = ("finetune.sbatch", config, f"init_from={finished.run}", "training.steps=1")

    slurm.require_completed(
        slurm.submit(*words, cwd=tmp_path, options=cpu_options(nodes=1)), tmp_path
    )

    before, after = (read_metrics(run) for run in (finished.run, tmp_path / "run"))
    val_loss = [line["val_loss"] for line in before if "val_loss" in line][-1]
    assert after[0]["val_loss"] == pytest.approx(val_loss, abs=1e-4)
    assert last_step(tmp_path / "run") == 1


def test_a_copied_sbatch_file_names_the_files_that_it_lacks(slurm: Slurm, tmp_path: Path) -> None:
    alone = tmp_path / "train.sbatch"
    alone.write_bytes((REPOSITORY / "slurm/train.sbatch").read_bytes())
    job_id = slurm.command(
        "sbatch", "--parsable", *cpu_options().split(), alone, "any.yaml", cwd=tmp_path
    ).strip()
    assert slurm.wait(job_id, tmp_path)["ExitCode"] == "13:0"
    assert "ranks.sh and network.sh are neither beside" in read_log(tmp_path, job_id)
