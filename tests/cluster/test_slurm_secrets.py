"""A secret in an address reaches the jobs of a real Slurm, and nothing that others can read."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import ConfigError
from megaback.tracking.metrics import read_metrics
from tests.helpers.file_server import FileServer, serving
from tests.helpers.planted import PLANT, files_with_plant, watched_processes
from tests.helpers.small_cluster import SMALL_JOB, Slurm, read_log

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def _with_secret(address: str) -> str:
    return address.replace("://", f"://user:{PLANT}@") + f"?id=7&sig={PLANT}"


def _serve(server: FileServer, folder: Path, prefix: str = "") -> None:
    server.key = PLANT
    for path in folder.iterdir():
        if path.is_file():
            server.files[prefix + path.name] = path.read_bytes()


def _jobs(run: Path) -> dict[str, str]:
    record = json.loads(max((run / "submitted").glob("*/submission.json")).read_text())
    return {job["stage"]: job["job"] for job in record["jobs"]}


def test_jobs_use_a_secret_without_showing_it(
    write_config: Callable[..., Path],
    slurm: Slurm,
    tiny_text_folder: Path,
    tiny_shards: Path,
    tokenizer_path: Path,
    tmp_path: Path,
) -> None:
    user, out, shards = tmp_path / "user", tmp_path / "out", tmp_path / "out/shards"
    user.mkdir()
    out.mkdir()
    with serving() as server, watched_processes() as seen:
        _serve(server, tiny_text_folder)
        _serve(server, tiny_shards, "set/")
        # On a command line of megaback: a source, and shards of another run.
        source = _with_secret(server.url("a.jsonl"))
        config = write_config(user, run=str(out / "one"), data={"shards": str(shards)})
        chain = ("submit", config, "training.steps=2", *SMALL_JOB, "--chain=data,train")
        chain = (*chain, "--tasks=1", "--source", source, "--tokenizer", tokenizer_path)
        said = slurm.megaback(*chain, "--dry-run", cwd=out) + slurm.megaback(*chain, cwd=out)
        remote = f"data.shards={_with_secret(server.url('set'))}"
        other = ("submit", config, f"run={out / 'two'}", "training.steps=2", remote, *SMALL_JOB)
        said += slurm.megaback(*other, "--nodes=2", cwd=out)
        one, two = _jobs(out / "one"), _jobs(out / "two")
        for job, run in ((one["data"], "one"), (two["train"], "two")):
            slurm.require_completed(job, out / run / "logs")
            said += slurm.command("scontrol", "show", "job", job)
            slurm.command("scancel", one["train"])  # it would read nothing from the server
        # On sbatch's command line, which Slurm shows: refused before a rank starts.
        refused = slurm.submit("train.sbatch", config, f"run={out / 'three'}", remote, cwd=out)
        assert slurm.wait(refused, out)["ExitCode"] == f"{ConfigError.exit_code}:0"
        assert "export it as MEGABACK_SECRET_NAME before sbatch" in read_log(out, refused)

    assert (shards / "manifest.json").is_file()
    assert [line["step"] for line in read_metrics(out / "two") if "loss" in line] == [1, 2]
    snapshot = yaml.safe_load(next((out / "two").glob("submitted/*/config.yaml")).read_text())
    assert "${MEGABACK_SECRET_" in snapshot["data"]["shards"]
    assert PLANT not in said
    assert files_with_plant([out]) == []
    assert [line for line in seen if not {"submit", f"run={out / 'three'}"} & {*line}] == []
