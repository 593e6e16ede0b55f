"""`megaback submit` and `megaback jobs`: from text to a model on a real Slurm."""

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from megaback.faults.exit_record import read_history
from megaback.tracking.metrics import read_metrics
from tests.helpers.small_cluster import SMALL_JOB, Slurm, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def _submission(run: Path) -> dict[str, object]:
    return json.loads(max((run / "submitted").glob("*/submission.json")).read_text())


def _jobs(run: Path) -> dict[str, str]:
    return {job["stage"]: job["job"] for job in _submission(run)["jobs"]}  # type: ignore[attr-defined]


def test_a_chain_makes_a_model_from_text_and_its_run_resumes_on_more_nodes(
    write_config: Callable[..., Path],
    slurm: Slurm,
    tiny_text_folder: Path,
    tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    shards, out, run = tmp_path / "the shards", tmp_path / "the model", tmp_path / "run"
    config = write_config(tmp_path, data={"shards": str(shards)})  # spaces survive
    slurm.megaback(
        *("shards", "plan", "--source", tiny_text_folder, "--tokenizer", tokenizer_path),
        *("--frame-tokens", 1024, "--tasks", 2, "--out", shards),
        cwd=tmp_path,
    )
    chain = ("submit", config, "training.steps=3", *SMALL_JOB, "--nodes=1", "--out", out)
    chain = (*chain, "--chain=data,train,convert", "--max-requeues=0")
    before = sorted(tmp_path.rglob("*"))
    shown = slurm.megaback(*chain, "--dry-run", cwd=tmp_path)
    assert sorted(tmp_path.rglob("*")) == before
    said = slurm.megaback(*chain, cwd=tmp_path)
    jobs = _jobs(run)
    waiting = slurm.megaback("jobs", tmp_path, cwd=tmp_path)
    for job_id in jobs.values():
        slurm.require_completed(job_id, run / "logs")

    assert list(jobs) == ["data", "train", "convert"]
    assert all(f"{stage}: job {job_id}" in said for stage, job_id in jobs.items())
    for words in ("--array=0-1%32", "afterok:JOB_OF_DATA", "afterok:JOB_OF_TRAIN", "--nodes=1"):
        assert words in shown
    assert "#SBATCH --signal=B:USR1@180" in shown
    assert f"{jobs['convert']} (convert)" in waiting
    assert (out / "model.safetensors").is_file()

    snapshot = next((run / "submitted").iterdir())
    record = _submission(run)
    assert record["code"]["megaback"]  # type: ignore[index]
    assert yaml.safe_load((snapshot / "config.yaml").read_text())["training"]["steps"] == 3
    assert {path.name for path in snapshot.iterdir()} >= {"train.sbatch", "ranks.sh", "network.sh"}
    assert [path.name for path in tmp_path.glob("*.out")] == []

    slurm.megaback("submit", config, "training.steps=5", *SMALL_JOB, "--nodes=2", cwd=tmp_path)
    slurm.require_completed(_jobs(run)["train"], run / "logs")
    starts = [line for line in read_history(run) if line["event"] == "start"]
    assert [(line["step"], line["world_size"]) for line in starts] == [(0, 1), (3, 2)]
    assert [line["step"] for line in read_metrics(run) if "loss" in line] == [1, 2, 3, 4, 5]
    row = json.loads(slurm.megaback("jobs", "--json", run, cwd=tmp_path))
    assert (row["state"], row["step"], row["total_steps"]) == ("finished", 5, 5)


def test_jobs_after_a_failed_build_are_canceled(
    write_config: Callable[..., Path], slurm: Slurm, tokenizer_path: Path, tmp_path: Path
) -> None:
    source, run = tmp_path / "text.jsonl", tmp_path / "run"
    source.write_text('{"text": "fine"}\n{"text": 5}\n')
    config = write_config(tmp_path, data={"shards": str(tmp_path / "shards")})
    slurm.megaback(
        *("submit", config, *SMALL_JOB, "--chain=data,train,convert", "--out", tmp_path / "model"),
        *("--source", source, "--tokenizer", tokenizer_path),
        cwd=tmp_path,
    )
    jobs = _jobs(run)
    states = {stage: slurm.wait(job, run / "logs")["JobState"] for stage, job in jobs.items()}
    assert states == {"data": "FAILED", "train": "CANCELLED", "convert": "CANCELLED"}
    assert slurm.megaback("jobs", run, cwd=tmp_path).count("cancelled") == 2
    wait_for(lambda: "text.jsonl" in next((run / "logs").glob("data-*.out")).read_text(), 10)


@pytest.mark.parametrize(
    ("options", "code", "sentence"),
    [
        (("--nodes=3",), 11, "not divisible by 3 ranks; use 9 rows"),
        (("--nodes=8",), 13, "Slurm refuses the train job"),
        (("--nodes=2", "--partition=absent"), 13, "`sinfo` lists the partitions"),
        (("--gpus",), 10, "hardware.device is cpu, but --gpus was given"),
        (("hardware.device=cuda", "--device-name=h101"), 10, "unknown device 'h101'"),
        (
            ("hardware.device=cuda", "--device-name=l4-24gb", "model.width=16384"),
            14,
            "the smallest change that fits is",
        ),
        (("--chain=convert,train",), 10, "is not supported; give train"),
        (("--out=model",), 10, "--out is for the stage convert"),
        (("init_from=absent",), 40, "init_from absent is not a model's folder"),
        (("run=config.yaml/run",), 74, "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_an_invalid_run_is_refused_before_it_is_queued(
    options: tuple[str, ...],
    code: int,
    sentence: str,
    write_config: Callable[..., Path],
    slurm: Slurm,
    tmp_path: Path,
) -> None:
    config = write_config(tmp_path)
    done = slurm.attempt(
        sys.executable, "-m", "megaback", "submit", config, *SMALL_JOB, *options, cwd=tmp_path
    )
    assert (done.returncode, done.stdout) == (code, "")
    assert sentence in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
