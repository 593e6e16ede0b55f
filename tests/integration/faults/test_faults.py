"""Every fault of the table, on real runs of two processes."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from megaback.checkpoints.checkpoint import read_meta, verify_files
from megaback.run_folder import complete_checkpoints
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import metrics_of, tiny_config, training_environment, wait_for_step
from tests.helpers.warm_ranks import WarmRanks
from tests.integration.faults.consoles import CONSOLES
from tests.integration.faults.table import FAULTS, SAVE_EVERY, STEPS, Fault, as_markdown

pytestmark = pytest.mark.slow

_INJECTOR = Path(__file__).parent / "inject"
_TIMEOUT_S = 120
ON_A_DISK = {"full disk": "1400k", "read-only disk": "100m"}
"""Faults of a disk, and the disk's size: 1,400 KiB hold one checkpoint but not two."""

Start = Callable[..., "subprocess.Popen[str]"]
Finish = Callable[..., None]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    fields = tiny_config(tiny_shards)
    fields["training"]["steps"] = STEPS
    fields["checkpoint"]["every_steps"] = SAVE_EVERY
    fields["validation"]["every_steps"] = 20
    fields["hardware"] |= {"heartbeat_s": 0.5, "step_timeout_s": 5}
    path = tmp_path_factory.mktemp("faults") / "config.yaml"
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="module")
def start(config: Path) -> Start:
    """`start(run, stage, *overrides, inject=None, console="file")`: `megaback train`."""

    def start(
        run: Path,
        stage: int,
        *overrides: str,
        inject: dict[str, Any] | None = None,
        console: str = "file",
        environment: Mapping[str, str] | None = None,
    ) -> "subprocess.Popen[str]":
        path = os.pathsep.join([str(_INJECTOR), os.environ.get("PYTHONPATH", "")])
        variables = {**training_environment(), "PYTHONPATH": path, "FAULT": json.dumps(inject)}
        variables |= environment or {}
        command = [sys.executable, "-m", "megaback", "train", config, f"run={run}"]
        command += [f"zero.stage={stage}", *overrides]
        with run.with_suffix(".txt").open("w") as output:
            return CONSOLES[console](command, output, cwd=ROOT, env=variables)

    return start


@pytest.fixture(scope="module")
def finish(config: Path, warm_ranks: Callable[[int], WarmRanks]) -> Finish:
    """`finish(run, stage, *overrides)`: train to the end, in rank processes that already run."""

    def finish(run: Path, stage: int, *overrides: str) -> None:
        words = (f"run={run}", f"zero.stage={stage}", *overrides)
        warm_ranks(2).train(config, words, run.with_suffix(".txt"))

    return finish


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, finish: Finish) -> Callable[[int], Path]:
    """`undisturbed(stage)`: a finished run without a fault, with checkpoint copies in `second`."""
    folder = tmp_path_factory.mktemp("undisturbed")

    def run_of(stage: int) -> Path:
        run = folder / f"stage-{stage}"
        if not run.exists():
            finish(run, stage, f"checkpoint.copy_to={folder / 'second'}")
        return run

    return run_of


def printed_by(run: Path) -> str:
    return run.with_suffix(".txt").read_text()


def stopped_after_30(source: Path, run: Path) -> None:
    """Copy a finished run in its state after the second to last checkpoint."""
    shutil.copytree(source, run)
    shutil.rmtree(run / "checkpoints" / f"step-{STEPS:08d}")
    (run / "exit.json").unlink()
    (run / "checkpoints" / "latest").write_text(f"step-{STEPS - SAVE_EVERY:08d}\n")


@contextmanager
def small_disk(run: Path, size: str) -> Iterator[None]:
    """Mount a file system under a run; it has room afterwards."""
    (run / "checkpoints").mkdir(parents=True)
    command = ["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(run / "checkpoints")]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("mounting a file system needs root")
    try:
        yield
        subprocess.run(
            ["mount", "-o", "remount,rw,size=100m", str(run / "checkpoints")], check=True
        )
    except BaseException:
        subprocess.run(["umount", "--lazy", str(run / "checkpoints")], check=False)
        raise


def inflict(fault: Fault, name: str, run: Path, start: Start) -> int:
    """Start a run with a fault; returns its exit code."""
    options = {"console": fault.console, "environment": fault.environment}
    process = start(run, fault.stage, *fault.overrides, inject=fault.inject, **options)
    if fault.act is not None:
        wait_for_step(process, run, fault.at_step, run.with_suffix(".txt"))
        fault.act(process, run)
    return process.wait(_TIMEOUT_S)


@pytest.mark.parametrize("name", FAULTS)
def test_fault(
    name: str,
    tmp_path: Path,
    start: Start,
    finish: Finish,
    undisturbed: Callable[[int], Path],
) -> None:
    fault = FAULTS[name]
    run = tmp_path / "run"
    whole = undisturbed(fault.stage)
    overrides: tuple[str, ...] = ()
    if name == "checkpoints lost":
        stopped_after_30(whole, run)
        shutil.rmtree(run / "checkpoints")
        second = tmp_path / "second"
        shutil.copytree(whole.parent / "second" / whole.name, second / run.name)
        shutil.rmtree(second / run.name / f"step-{STEPS:08d}")
        overrides = (f"checkpoint.copy_to={second}",)
    elif fault.damage is not None:
        stopped_after_30(whole, run)
        fault.damage(run)
    elif name in ON_A_DISK:
        with small_disk(run, ON_A_DISK[name]):
            code = inflict(fault, name, run, start)
    else:
        code = inflict(fault, name, run, start)

    if fault.code is not None:
        if fault.damage is not None:
            code = start(run, fault.stage).wait(_TIMEOUT_S)
        assert code == fault.code, printed_by(run)
        assert fault.output in printed_by(run)
        lines = printed_by(run).splitlines()
        assert len({line for line in lines if "megaback: error:" in line}) <= 1
        if fault.damage is None:  # else the start was refused before it wrote anything
            ending = json.loads((run / "exit.json").read_text())
            expected = fault.code if fault.recorded is None else fault.recorded
            assert ending["code"] == expected or fault.code < 0
        for target in complete_checkpoints(run):
            if fault.damage is None:
                verify_files(target, read_meta(target))
    if fault.resumes and (fault.code is not None or fault.damage or overrides):
        finish(run, fault.stage, *overrides)
        if fault.code is None:
            assert fault.output in printed_by(run)
    elif fault.code is None:
        assert code == 0, printed_by(run)
    if fault.resumes:
        assert metrics_of(run) == metrics_of(whole)
    if fault.check is not None:
        fault.check(run)
    if name in ON_A_DISK:
        subprocess.run(["umount", "--lazy", str(run / "checkpoints")], check=True)


def test_the_documentation_lists_the_faults() -> None:
    assert (ROOT / "docs" / "faults.md").read_text() == as_markdown()
