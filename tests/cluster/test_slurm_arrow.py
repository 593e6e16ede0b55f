"""The runs of an arrow of time as separate jobs, and their result."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.small_cluster import SMALL_JOB, Slurm

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def _found_in(run: Path) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((run / "arrow.json").read_text())
    assert fields.pop("config")["run"] == str(run)
    return fields


def test_an_arrow_of_two_jobs_equals_that_of_one_command(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    config = write_config(tmp_path)
    queued, here = tmp_path / "arrows" / "queued", tmp_path / "arrows" / "here"
    runs = [queued / "seed-5" / direction for direction in ("backward", "forward")]
    options = ("training.seed=5", "training.steps=4")
    for run in runs:
        direction = f"data.direction={run.name}"
        words = ("submit", config, f"run={run}", direction, *options, *SMALL_JOB, "--nodes=1")
        slurm.megaback(*words, cwd=tmp_path)
    rows = [
        json.loads(line)
        for line in slurm.megaback("jobs", "--json", queued.parent, cwd=tmp_path).splitlines()
    ]
    for row in rows:
        slurm.require_completed(row["job"], Path(row["run"]) / "logs")
    slurm.megaback("arrow", config, f"run={queued}", *options, "--measure-only", cwd=tmp_path)
    slurm.megaback("arrow", config, f"run={here}", *options, cwd=tmp_path)

    assert [row["run"] for row in rows] == [str(run) for run in runs]
    assert _found_in(queued) == _found_in(here)
    assert (queued / "arrow.png").is_file()
