"""A missing program is named, with the exit code of its purpose, not as a storage error.

The programs are hidden by an empty folder as PATH.
"""

import os
import shutil
import socket
import subprocess
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

from data_pipeline.common.command import Command
from data_pipeline.errors import BackendError, LaunchError
from launcher.memory_check import gpus_of_partition
from launcher.slurm import commands as slurm_commands
from launcher.slurm import job as slurm_job
from launcher.slurm.submit import main as submit
from megaback.distributed import rendezvous
from megaback.distributed.slurm_nodes import first_node
from megaback.inference.decoder import Decoder
from megaback.model.compiler import require_compiler
from megaback.tracking.code_version import code_changes, code_version
from tests.helpers.decoding import CONTEXT_TOKENS
from tests.helpers.run_config import run_config
from tests.helpers.small_models import make_model

# First line of `scontrol show hostnames` of Slurm 22.05.
FIRST_NODES = {
    "gpu-a[001-002,7],login-b": "gpu-a001",
    "r[1-2]n[1-4]": "r1n1",
    "n[5,1-3]": "n5",
    "n[1-3,7,9-12]": "n1",
    "n[001-003,007,009-064]": "n001",
    "n[01,1]": "n01",
    "b3,a[1-2]": "b3",
    "tux[0-1][2-3]": "tux02",
    "a[1-2]b[1-2]c[01-02],q": "a1b1c01",
    "[1-3]": "1",
    "host": "host",
    "c7.cluster.example": "c7.cluster.example",
}
STEP = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "0",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_TASKS_PER_NODE": "1(x4)",
    "SLURM_STEP_NODELIST": "gpu-a[001-002,7],login-b",
}


@pytest.fixture
def no_programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "nothing"))
    for name in ("CC", "CXX"):
        monkeypatch.delenv(name, raising=False)


def _start(*words: str, cwd: Path | None = None) -> tuple[int, str]:
    @click.command(cls=Command)
    def command() -> None:
        subprocess.run(words, check=False, cwd=cwd)

    result = CliRunner().invoke(command, [])
    return result.exit_code, result.stderr


@pytest.mark.usefixtures("no_programs")
@pytest.mark.parametrize("program", ["scontrol", "g++", "ssh", "some-program"])
def test_a_missing_program_is_named_and_is_not_a_storage_error(program: str) -> None:
    code, said = _start(program)
    assert (code, f"the program {program} is not installed" in said) == (12, True)
    assert "disk" not in said


def test_a_file_that_cannot_be_executed_is_not_a_storage_error(tmp_path: Path) -> None:
    program = tmp_path / "program"
    program.write_text("#!/bin/sh\n")
    program.chmod(0o644)
    code, said = _start(str(program))
    assert (code, f"{program} cannot be started" in said) == (12, True)


def test_a_missing_file_is_still_a_storage_error(tmp_path: Path) -> None:
    @click.command(cls=Command)
    def command() -> None:
        (tmp_path / "nowhere").read_bytes()

    result = CliRunner().invoke(command, [])
    assert (result.exit_code, "cannot read or write" in result.stderr) == (74, True)


@pytest.mark.parametrize("nodes", FIRST_NODES)
def test_the_first_node_is_read_without_slurm(nodes: str) -> None:
    assert first_node(nodes) == FIRST_NODES[nodes]


@pytest.mark.skipif(shutil.which("scontrol") is None, reason="scontrol is not installed")
@pytest.mark.parametrize("nodes", FIRST_NODES)
def test_the_first_node_is_the_one_that_slurm_lists_first(nodes: str, tmp_path: Path) -> None:
    config = tmp_path / "slurm.conf"
    config.write_text("ClusterName=x\nSlurmctldHost=localhost\n")
    listing = subprocess.run(
        ["scontrol", "show", "hostnames", nodes],
        env={"SLURM_CONF": str(config), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert listing.stdout.split()[0] == FIRST_NODES[nodes]


@pytest.mark.parametrize("nodes", ["", "n[", "n[]", "x[a-c]", "n[1-", "n 1"])
def test_an_invalid_node_list_is_refused(nodes: str) -> None:
    with pytest.raises(LaunchError, match="set MASTER_ADDR to the first node"):
        first_node(nodes)


def _ranks_address(monkeypatch: pytest.MonkeyPatch, **more: str) -> str:
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_SIZE", "MASTER_ADDR", "MASTER_PORT")
    with monkeypatch.context() as patch:
        for name in names:
            patch.setenv(name, "")  # so that the variables are restored
            patch.delenv(name)
        for name, value in (STEP | more).items():
            patch.setenv(name, value)
        rendezvous.name_rank()
        return rendezvous.os.environ["MASTER_ADDR"]


@pytest.mark.usefixtures("no_programs")
def test_a_rank_in_a_container_finds_the_first_node(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _ranks_address(monkeypatch) == "gpu-a001"
    assert _ranks_address(monkeypatch, MASTER_ADDR="10.0.0.7") == "10.0.0.7"


def test_an_unknown_first_node_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(*_: object) -> None:
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(rendezvous, "_NAME_WAIT_S", 0.0)
    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    with pytest.raises(LaunchError, match=r"gpu-a001, cannot be resolved .* set MASTER_ADDR"):
        rendezvous.require_known("gpu-a001")


@pytest.mark.usefixtures("no_programs")
def test_missing_slurm_commands_are_no_error_where_they_are_optional() -> None:
    assert slurm_commands.find_job("7") is None
    slurm_commands.cancel("7")
    assert slurm_job._requeue("7", []) == "scontrol is not installed"
    assert gpus_of_partition(None) == (set(), "sinfo is not installed")
    assert code_version()["megaback"]
    assert code_changes() == ""


@pytest.mark.usefixtures("no_programs")
def test_a_missing_compiler_is_reported_before_compiling() -> None:
    with pytest.raises(BackendError, match=r"training\.compile needs a compiler, and g\+\+ is not"):
        require_compiler("cpu", "training.compile")
    with pytest.raises(BackendError, match="gcc or clang or cc"):
        require_compiler("cuda", "training.compile")
    with pytest.raises(BackendError, match="unset `compiled`"):
        Decoder(make_model(), CONTEXT_TOKENS, compiled=True)


@pytest.mark.parametrize(("options", "code"), [(["--dry-run"], 0), ([], 13)])
@pytest.mark.usefixtures("no_programs")
def test_a_dry_run_of_submit_needs_no_slurm(
    options: list[str], code: int, tiny_shards: Path, tmp_path: Path
) -> None:
    config = run_config(tmp_path / "run", data={"shards": str(tiny_shards)})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    result = CliRunner().invoke(submit, [str(path), "--cpu", "hardware.device=cpu", *options])
    assert result.exit_code == code, result.output
    said = "not tested by Slurm, since sbatch is" if options else "sbatch is not installed"
    assert said in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("options", "code"), [(["--dry-run"], 0), ([], 13)])
@pytest.mark.parametrize(
    "said",
    [
        "sbatch: error: fetch_config: DNS SRV lookup failed",
        "sbatch: error: Batch job submission failed: Unable to contact slurm controller (connect "
        "failure)",
    ],
)
def test_a_dry_run_of_submit_needs_no_controller(
    options: list[str],
    code: int,
    said: str,
    tiny_shards: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """An sbatch that fails as Slurm 22.05's does without a controller."""
    sbatch = tmp_path / "bin" / "sbatch"
    sbatch.parent.mkdir()
    sbatch.write_text(f"#!/bin/sh\necho '{said}' >&2\nexit 1\n")
    sbatch.chmod(0o755)
    monkeypatch.setenv("PATH", str(sbatch.parent), prepend=os.pathsep)
    config = run_config(tmp_path / "run", data={"shards": str(tiny_shards)})
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config.model_dump(mode="json")))
    result = CliRunner().invoke(submit, [str(path), "--cpu", "hardware.device=cpu", *options])
    assert result.exit_code == code, result.output
    if options:
        assert "not tested by Slurm, since no Slurm controller can be reached" in result.output
    else:
        assert "no Slurm controller can be reached" in result.output
        assert "correct the option" not in result.output
    assert not (tmp_path / "run").exists()
