"""Slurm's command lines and output, and the shipped sbatch files."""

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from launcher.slurm.commands import Submission, parse_job
from launcher.slurm.sbatch_files import sbatch_value, shipped_folder
from tests.helpers.paths import ROOT

# Output of Slurm 22.05, without unused fields.
RUNNING = (
    "JobId=2 JobName=x Reason=None JobState=RUNNING Restarts=1 RunTime=1-00:00:30 "
    "TimeLimit=1-00:10:00 NodeList=n[1-2] Command=/a b/train.sbatch a=b c.yaml WorkDir=/\n"
)
PENDING = (
    "JobId=3 JobState=PENDING Reason=Dependency Restarts=0 RunTime=00:00:00 TimeLimit=UNLIMITED\n"
)
texts = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=20)


def element(state: str) -> str:
    return f"JobId=5 ArrayJobId=4 ArrayTaskId=1 JobState={state} Restarts=0 RunTime=00:00:01\n"


@given(st.dictionaries(st.sampled_from(["A", "B"]), texts), st.lists(texts), texts)
def test_a_shell_splits_the_printed_line_into_the_same_words(
    variables: dict[str, str], arguments: list[str], file: str
) -> None:
    submission = Submission(
        stage="train",
        variables=variables,
        options=("--nodes=2",),
        file=file,
        arguments=tuple(arguments),
    )
    words = shlex.split(submission.line)
    assert words[: len(variables)] == [f"{name}={value}" for name, value in variables.items()]
    assert words[len(variables) :] == submission.command


def test_a_running_job_has_nodes_and_time_left() -> None:
    job = parse_job("2", RUNNING)
    assert job is not None
    assert (job.state, job.nodes, job.left_s, job.restarts) == ("RUNNING", "n[1-2]", 570, 1)
    assert not job.is_over


def test_a_pending_job_has_a_reason() -> None:
    job = parse_job("3", PENDING)
    assert job is not None
    assert (job.reason, job.nodes, job.left_s) == ("Dependency", None, None)


@pytest.mark.parametrize(
    ("states", "expected"),
    [
        (["COMPLETED", "RUNNING", "FAILED"], "RUNNING"),
        (["COMPLETED", "FAILED"], "FAILED"),
        (["COMPLETED", "COMPLETED"], "COMPLETED"),
    ],
)
def test_the_state_of_an_array_is_that_of_an_active_or_failed_element(
    states: list[str], expected: str
) -> None:
    job = parse_job("4", "".join(element(state) for state in states))
    assert job is not None
    assert job.state == expected
    assert sum(job.elements.values()) == len(states)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(null)", ()),
        ("n2", ("n2",)),
        ("n[1-3,7,9-12],login", ("n[1-3,7,9-12]", "login")),
        ("r[1-2]n[1-4,6],q", ("r[1-2]n[1-4,6]", "q")),
    ],
)
def test_excluded_nodes_keep_slurms_ranges(text: str, expected: tuple[str, ...]) -> None:
    job = parse_job("2", RUNNING.replace("WorkDir", f"ExcNodeList={text} WorkDir"))
    assert job is not None
    assert job.excluded == expected


def test_empty_output_is_no_job() -> None:
    assert parse_job("9", "") is None


def test_sbatch_lines_are_parsed_as_slurm_does(tmp_path: Path) -> None:
    path = tmp_path / "x.sbatch"
    path.write_text(
        "#!/bin/bash\n##SBATCH --nodes=9\n#SBATCH --nodes=1\n# --nodes=8\n#SBATCH --nodes 2\n"
        "set -e\n#SBATCH --nodes=7\n"
    )
    assert sbatch_value(path, "nodes") == "2"
    assert sbatch_value(path, "time") is None


@pytest.mark.slow
def test_an_installed_wheel_contains_the_sbatch_files(tmp_path: Path) -> None:
    source, prefix = tmp_path / "source", tmp_path / "prefix"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    for name in ("megaback", "data_pipeline", "launcher", "tools", "slurm"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps"]
    # --ignore-installed: else pip uninstalls the checkout from this environment.
    install += ["--no-build-isolation", "--ignore-installed", f"--prefix={prefix}", str(source)]
    subprocess.run(install, check=True, capture_output=True, timeout=120)
    packages = next(prefix.rglob("site-packages"))
    code = "from launcher.slurm.sbatch_files import shipped_folder; print(shipped_folder())"
    said = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"PYTHONPATH": str(packages)},
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    folder = Path(said.stdout.strip())
    assert prefix in folder.parents
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == {
        path.name: path.read_bytes() for path in shipped_folder().iterdir()
    }
