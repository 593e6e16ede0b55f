"""The shipped sbatch files as text, and as tested by Slurm; no job is run."""

import os
import subprocess
from pathlib import Path

import pytest

from launcher.slurm.sbatch_files import sbatch_value
from tests.helpers.small_cluster import SLURM_FILES, SOURCED_FILES, Slurm

slurm_files = pytest.mark.parametrize("path", SLURM_FILES, ids=lambda path: path.name)
all_files = pytest.mark.parametrize(
    "path", [*SLURM_FILES, *SOURCED_FILES], ids=lambda path: path.name
)


def late_sbatch_lines(text: str) -> list[str]:
    """#SBATCH lines that Slurm ignores silently: those after the first command."""
    lines = text.splitlines()
    first_command = next(
        number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")
    )
    return [line for line in lines[first_command:] if line.lstrip().startswith("#SBATCH")]


@all_files
def test_all_sbatch_lines_are_before_the_first_command(path: Path) -> None:
    assert late_sbatch_lines(path.read_text()) == []


def test_an_sbatch_line_after_the_first_command_is_found() -> None:
    text = "#!/bin/bash\n#SBATCH --nodes=1\n\nset -e\n  #SBATCH --time=10\n"
    assert late_sbatch_lines(text) == ["  #SBATCH --time=10"]


@slurm_files
def test_sbatch_files_pass_their_arguments_on_unchanged(path: Path) -> None:
    assert '"$@"' in _code(path)


@all_files
def test_no_shell_string_is_built_from_arguments(path: Path) -> None:
    rest = _code(path).replace('"$@"', "")
    assert not any(form in rest for form in ("$@", "$*", "eval ", "bash -c", "sh -c"))
    subprocess.run(["bash", "-n", str(path)], check=True)


@slurm_files
def test_sbatch_files_name_no_partition_or_account(path: Path) -> None:
    assert sbatch_value(path, "partition") is None
    assert sbatch_value(path, "account") is None


IMAGE = "an image.sif"
_STAND_IN = """#!/bin/bash
printf '%s|' "${0##*/}" "$@" >>"$COMMANDS"
echo >>"$COMMANDS"
"""


def commands_of(path: Path, folder: Path, **variables: str) -> list[list[str]]:
    """The commands that a shipped file starts, recorded by stand-ins for the programs."""
    programs = folder / "bin"
    programs.mkdir(parents=True)
    for name in ("apptainer", "python", "scontrol", "srun"):
        (programs / name).write_text(_STAND_IN)
        (programs / name).chmod(0o755)
    subprocess.run(
        ["bash", path, "first", "two words"],
        env={
            "PATH": f"{programs}:{os.environ['PATH']}",
            "COMMANDS": str(folder / "commands"),
            "MEGABACK_ENV": str(folder),
            "SLURM_SUBMIT_DIR": str(path.parents[1]),
            **dict.fromkeys(("SLURM_JOB_ID", "SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_MAX"), "0"),
            **variables,
        },
        check=True,
    )
    lines = (folder / "commands").read_text().splitlines()
    return [line.split("|")[:-1] for line in lines]


def without_container(command: list[str], gpu: tuple[str, ...]) -> list[str]:
    """A recorded command without its container. Raises ValueError if it has none."""
    at = command.index("apptainer")
    assert command[at : at + 3 + len(gpu)] == ["apptainer", "exec", *gpu, IMAGE]
    return command[:at] + command[at + 3 + len(gpu) :]


@pytest.mark.parametrize(
    ("name", "gpu", "outside"),
    [
        ("build_shards.sbatch", (), 0),
        ("convert.sbatch", (), 0),
        ("backtranslate.sbatch", ("--nv",), 0),
        # scontrol and its callers, begin and end, run outside.
        ("train.sbatch", ("--nv",), 3),
        ("finetune.sbatch", ("--nv",), 3),
    ],
)
def test_the_same_commands_run_in_a_container(
    name: str, gpu: tuple[str, ...], outside: int, tmp_path: Path
) -> None:
    path = next(path for path in SLURM_FILES if path.name == name)
    variables = {"MASTER_PORT": "12345"}  # random by default
    usual = commands_of(path, tmp_path / "usual", **variables)
    contained = commands_of(path, tmp_path / "contained", MEGABACK_CONTAINER=IMAGE, **variables)

    assert not any("apptainer" in words for words in usual)
    assert any("two words" in words for words in usual)
    inside = [words for words in contained if "apptainer" in words]
    assert len(contained) - len(inside) == outside
    restored = [
        without_container(words, gpu) if "apptainer" in words else words for words in contained
    ]
    assert restored == usual


def test_a_container_without_apptainer_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    for name in ("python", "srun"):
        (tmp_path / "bin" / name).write_text(_STAND_IN)
        (tmp_path / "bin" / name).chmod(0o755)
    ranks = next(path for path in SOURCED_FILES if path.name == "ranks.sh")
    done = subprocess.run(
        ["/bin/bash", ranks],
        env={"PATH": "", "MEGABACK_ENV": str(tmp_path), "MEGABACK_CONTAINER": IMAGE},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 13
    assert "MEGABACK_CONTAINER is set, but apptainer is not on the PATH" in done.stderr


@pytest.mark.cluster
@slurm_files
def test_slurm_accepts_the_shipped_files_unmodified(slurm: Slurm, path: Path) -> None:
    assert "to start at" in slurm.command("sbatch", "--test-only", path, "anything")


def _code(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
