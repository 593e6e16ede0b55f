"""A sweep as one array of jobs, of which one loses its rank."""

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest

from megaback.faults.exit_record import read_history
from tests.helpers.small_cluster import SMALL_JOB, Slurm, last_step, ranks_of, wait_for

pytestmark = [pytest.mark.cluster, pytest.mark.slow]


def test_the_runs_of_an_array_end_and_requeue_each_by_itself(
    write_config: Callable[..., Path], slurm: Slurm, tmp_path: Path
) -> None:
    config, out = write_config(tmp_path), tmp_path / "sweep"
    words = ("optimizer.learning_rate=1e-3,3e-3", "training.steps=120", "--out", out)
    options = (*words, "--slurm", *SMALL_JOB)

    shown = slurm.megaback("sweep", config, *options, "--dry-run", cwd=tmp_path)
    assert not out.exists()
    slurm.megaback("sweep", config, *options, cwd=tmp_path)

    first, second = (out / f"learning_rate-{rate}" for rate in ("0.001", "0.003"))
    (snapshot,) = (out / "submitted").iterdir()
    wait_for(lambda: last_step(second) > 0, 60)
    for rank in ranks_of(snapshot / "1.yaml"):
        rank.send_signal(signal.SIGKILL)
    rows = slurm.megaback("jobs", "--json", out, cwd=tmp_path).splitlines()
    jobs = [json.loads(row)["job"] for row in rows]
    array = jobs[0].partition("_")[0]
    slurm.require_completed(array, out / "logs")

    assert "memory: not checked" in shown
    assert "--array=0-1" in shown
    assert "nothing was written" in shown
    assert jobs == [f"{array}_0", f"{array}_1"]
    starts = [
        [line["job"] for line in read_history(run) if line["event"] == "start"]
        for run in (first, second)
    ]
    assert starts == [[f"{array}_0"], [f"{array}_1"] * 2]
    assert sorted(path.name for path in (out / "logs").iterdir()) == [
        *(f"train-{array}_{index}.out" for index in (0, 1))
    ]
    result = json.loads(slurm.megaback("sweep", out, "--json", cwd=tmp_path))
    assert [run["state"] for run in result["runs"]] == ["finished"] * 2
    again = slurm.megaback("sweep", config, *options, cwd=tmp_path)
    assert "2 runs: 2 finished." in again
