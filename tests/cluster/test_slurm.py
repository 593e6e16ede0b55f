"""The files under slurm/, submitted to a real Slurm."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest
from small_cluster import NUM_STEPS, SLURM_FILES, Slurm, cpu_options, read_log, wait_for

from megaback.metrics import read_metrics

slurm_files = pytest.mark.parametrize("path", SLURM_FILES, ids=lambda path: path.name)
_TIMINGS = ("step_s", "tokens_per_s")


@slurm_files
def test_sbatch_lines_all_stand_before_the_first_command(path: Path) -> None:
    lines = path.read_text().splitlines()
    first_command = next(
        number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")
    )
    late = [line for line in lines[first_command:] if line.lstrip().startswith("#SBATCH")]
    assert late == [], "Slurm ignores these without a word"


@slurm_files
def test_sbatch_files_pass_their_arguments_on_as_they_came(path: Path) -> None:
    text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
    assert '"$@"' in text
    rest = text.replace('"$@"', "")
    assert not any(form in rest for form in ("$@", "$*", "eval ", "bash -c", "sh -c"))
    subprocess.run(["bash", "-n", str(path)], check=True)


@slurm_files
def test_sbatch_files_name_no_partition_or_account(path: Path) -> None:
    active = [line for line in path.read_text().splitlines() if line.startswith("#SBATCH")]
    assert not any(word in line for line in active for word in ("--partition", "--account"))


@pytest.mark.cluster
@slurm_files
def test_slurm_accepts_the_shipped_files_unmodified(slurm: Slurm, path: Path) -> None:
    assert "to start at" in slurm.command("sbatch", "--test-only", path, "anything")


@pytest.mark.cluster
@pytest.mark.slow
def test_a_run_on_two_nodes_has_the_losses_of_one_process(
    uninterrupted_run: Path, write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    subprocess.run(
        [sys.executable, "-m", "megaback.train", write_config(tmp_path)],
        env=slurm.environment,
        check=True,
        capture_output=True,
        timeout=120,
    )
    alone = read_metrics(tmp_path / "run")
    shared = read_metrics(uninterrupted_run)
    assert [line["step"] for line in shared if "loss" in line] == [*range(1, NUM_STEPS + 1)]
    assert [list(line) for line in shared] == [list(line) for line in alone]
    for of_shared, of_alone in zip(shared, alone, strict=True):
        for key in set(of_shared) - set(_TIMINGS):
            assert of_shared[key] == pytest.approx(of_alone[key], abs=1e-4), (key, of_alone["step"])


@pytest.mark.cluster
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_job_at_its_time_limit_saves_and_queues_itself_and_ends_as_if_undisturbed(
    uninterrupted_run: Path, write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    # The ranks are held after a few steps until the signal has come, so that neither a fast nor a
    # slow machine decides where it finds them.
    config = write_config(tmp_path)
    options = f"{cpu_options(tasks_per_node=2)} --time=2 --signal=B:USR1@50"
    job_id = slurm.submit("train.sbatch", config, cwd=tmp_path, options=options)
    wait_for(lambda: _last_step(tmp_path / "run") >= 5, 280, lambda: read_log(tmp_path, job_id))
    held = _ranks_of(config)
    signals_seen = read_log(tmp_path, job_id).count("passing a signal on")
    for rank in held:
        rank.send_signal(signal.SIGSTOP)
    try:
        wait_for(
            lambda: read_log(tmp_path, job_id).count("passing a signal on") > signals_seen, 120
        )
    finally:
        for rank in held:
            rank.send_signal(signal.SIGCONT)
    job = slurm.require_completed(job_id, tmp_path)

    assert len(held) == 4
    assert int(job["Restarts"]) >= 1
    log = read_log(tmp_path, job_id)
    assert "asked to stop after" in log
    assert "the step ended with code 75 and the job is queued again" in log
    saved = [
        json.loads(path.read_text())["step"]
        for path in (tmp_path / "run/checkpoints").glob("step-*/meta.json")
    ]
    assert len(saved) == 2
    assert 5 <= min(saved) < max(saved) == NUM_STEPS
    assert _without_timings(tmp_path / "run") == _without_timings(uninterrupted_run)


@pytest.mark.cluster
@pytest.mark.slow
def test_a_cancelled_job_saves_and_does_not_come_back(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    config = write_config(tmp_path, training={"steps": 100_000, "precision": "fp32"})
    job_id = slurm.submit("train.sbatch", config, cwd=tmp_path, options=cpu_options(nodes=1))
    wait_for(lambda: _last_step(tmp_path / "run") >= 3, 120, lambda: read_log(tmp_path, job_id))
    slurm.command("scancel", job_id)
    job = slurm.wait(job_id, tmp_path)
    wait_for(lambda: "asked to stop after" in read_log(tmp_path, job_id), 30)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0")
    assert "queued again" not in read_log(tmp_path, job_id)
    assert list((tmp_path / "run/checkpoints").glob("step-*/meta.json"))


@pytest.mark.cluster
@pytest.mark.slow
def test_the_job_has_the_exit_code_of_the_ranks(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    job_id = slurm.submit(
        "train.sbatch", config, "optimizer.learning_rat=1", cwd=tmp_path, options=cpu_options()
    )
    job = slurm.wait(job_id, tmp_path)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "10:0", "0")
    assert "did you mean optimizer.learning_rate?" in read_log(tmp_path, job_id)


@pytest.mark.cluster
@pytest.mark.slow
def test_building_training_and_converting_follow_one_another(
    write_config: Callable[..., Path],
    slurm: Slurm,
    tiny_text_folder: Path,
    tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    shards, out = tmp_path / "the shards", tmp_path / "the model"  # spaces survive
    config = write_config(tmp_path)
    build = slurm.submit(
        "build_shards.sbatch",
        *("--source", tiny_text_folder, "--tokenizer", tokenizer_path, "--out", shards),
        *("--frame-tokens", 1024),
        cwd=tmp_path,
        options="--array=0-2",
    )
    train = slurm.submit(
        "train.sbatch",
        *(config, f"data.shards={shards}", "training.steps=3"),
        cwd=tmp_path,
        options=f"{cpu_options(nodes=1)} {_after(build)}",
    )
    convert = slurm.submit(
        "convert.sbatch",
        *(tmp_path / "run", "--out", out),
        cwd=tmp_path,
        options=_after(train),
    )
    for job_id in (build, train, convert):
        slurm.require_completed(job_id, tmp_path)
    assert (out / "model.safetensors").is_file()


@pytest.mark.cluster
def test_what_depends_on_a_failed_build_is_cancelled(slurm: Slurm, tmp_path: Path) -> None:
    build = slurm.submit(
        "build_shards.sbatch", "--source", "absent", cwd=tmp_path, options="--array=0-1"
    )
    train = slurm.submit("train.sbatch", "any.yaml", cwd=tmp_path, options=_after(build))
    assert slurm.wait(build, tmp_path)["JobState"] == "FAILED"
    assert slurm.wait(train, tmp_path)["JobState"] == "CANCELLED"


@pytest.mark.cluster
@pytest.mark.slow
def test_two_runs_share_nodes_without_meeting_on_a_port(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    folders = [tmp_path / "first", tmp_path / "second"]
    jobs = []
    for folder in folders:
        folder.mkdir()
        config = write_config(folder)
        jobs.append(
            slurm.submit(
                "train.sbatch", config, "training.steps=3", cwd=folder, options=cpu_options()
            )
        )
    ended = [
        slurm.require_completed(job, folder) for job, folder in zip(jobs, folders, strict=True)
    ]
    starts = [datetime.fromisoformat(job["StartTime"]) for job in ended]
    ends = [datetime.fromisoformat(job["EndTime"]) for job in ended]
    assert ended[0]["NodeList"] == ended[1]["NodeList"] == "n[1-2]"
    assert max(starts) < min(ends), "the runs did not overlap"
    assert _without_timings(folders[0] / "run") == _without_timings(folders[1] / "run")


def _after(job_id: str) -> str:
    return f"--dependency=afterok:{job_id} --kill-on-invalid-dep=yes"


def _last_step(run: Path) -> int:
    if not (run / "metrics.jsonl").exists():
        return 0
    return max((line["step"] for line in read_metrics(run)), default=0)


def _without_timings(run: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in _TIMINGS}
        for line in read_metrics(run)
    ]


def _ranks_of(config: Path) -> list[psutil.Process]:
    """The rank processes of a config; from outside a node's namespace they can all be seen."""
    return [
        process
        for process in psutil.process_iter(["name", "cmdline"])
        if process.info["name"].startswith("python")
        and (process.info["cmdline"] or [])[1:4] == ["-m", "megaback.train", str(config)]
    ]
