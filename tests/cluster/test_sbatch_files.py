"""The shipped files as text, and what Slurm says to them; no job is run."""

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
    """#SBATCH lines that Slurm ignores without a word: those after the first command."""
    lines = text.splitlines()
    first_command = next(
        number for number, line in enumerate(lines) if line.strip() and not line.startswith("#")
    )
    return [line for line in lines[first_command:] if line.lstrip().startswith("#SBATCH")]


@all_files
def test_sbatch_lines_all_stand_before_the_first_command(path: Path) -> None:
    assert late_sbatch_lines(path.read_text()) == []


def test_an_sbatch_line_after_the_first_command_is_found() -> None:
    text = "#!/bin/bash\n#SBATCH --nodes=1\n\nset -e\n  #SBATCH --time=10\n"
    assert late_sbatch_lines(text) == ["  #SBATCH --time=10"]


@slurm_files
def test_sbatch_files_pass_their_arguments_on_as_they_came(path: Path) -> None:
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


@pytest.mark.cluster
@slurm_files
def test_slurm_accepts_the_shipped_files_unmodified(slurm: Slurm, path: Path) -> None:
    assert "to start at" in slurm.command("sbatch", "--test-only", path, "anything")


def _code(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if not line.startswith("#"))
