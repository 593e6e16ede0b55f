"""A real Slurm of four nodes on this machine.

`minislurm.sh` starts the daemons that a cluster runs, each node in namespaces of its own. That
needs root and the Slurm packages; where one of them is missing, the tests are skipped with the
reason.
"""

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.small_cluster import (
    NUM_STEPS,
    FinishedRun,
    Slurm,
    cpu_options,
    read_log,
    running_cluster,
    why_no_cluster,
)
from tests.helpers.tiny_run import training_environment


@pytest.fixture(scope="session")
def slurm() -> Iterator[Slurm]:
    """Nodes n1 to n4, declared large enough for the shipped files; stopped at the end."""
    reason = why_no_cluster()
    if reason:
        pytest.skip(reason)
    with running_cluster() as cluster:
        yield cluster


@pytest.fixture(scope="session")
def write_config(tiny_shards: Path) -> Callable[..., Path]:
    """`write_config(folder, **top-level keys)`: a model of two layers, its run in `folder/run`."""

    def write(folder: Path, **changes: Any) -> Path:
        fields = {
            "run": str(folder / "run"),
            "data": {"shards": str(tiny_shards)},
            "model": {"num_layers": 2, "width": 64, "num_heads": 2},
            "batch": {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 2},
            "optimizer": {"learning_rate": 3e-3, "warmup_steps": 3},
            "training": {"steps": NUM_STEPS, "precision": "fp32"},
            "zero": {"stage": 2},
            "hardware": {"device": "cpu", "collective_timeout_s": 120},
        } | changes
        path = folder / "config.yaml"
        path.write_text(yaml.safe_dump(fields))
        return path

    return write


@pytest.fixture(scope="session")
def finished(
    slurm: Slurm, write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> FinishedRun:
    """A run trained by the shipped file on two nodes with two ranks and two (fake) GPUs each."""
    base = tmp_path_factory.mktemp("finished")
    folder, home, temporary = base / "folder", base / "home", base / "temporary"
    for path in (folder, home, temporary):
        path.mkdir()
    job_id = slurm.submit(
        "train.sbatch",
        write_config(folder),
        cwd=folder,
        options=cpu_options(tasks_per_node=2, gpus_per_node=2),
        HOME=home,
        TMPDIR=temporary,
    )
    slurm.require_completed(job_id, folder)
    return FinishedRun(
        run=folder / "run",
        folder=folder,
        home=home,
        temporary=temporary,
        log=read_log(folder, job_id),
    )


@pytest.fixture(scope="session")
def undisturbed(
    write_config: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    """A run of two ranks without Slurm, to its end."""
    folder = tmp_path_factory.mktemp("undisturbed")
    subprocess.run(
        [sys.executable, "-m", "megaback", "train", write_config(folder), "hardware.processes=2"],
        env=training_environment(),
        check=True,
        timeout=120,
    )
    return folder / "run"
