"""Every benchmark runs in smoke mode: as a process, on a little synthetic data."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow

_FOLDER = ROOT / "benchmarks"
_HELPER = "smoke.py"
BENCHMARKS = sorted(path for path in _FOLDER.glob("*.py") if path.name != _HELPER)


@pytest.mark.timeout(900)  # the longest takes 45 s of CPU time, and machines are busy
@pytest.mark.parametrize("path", BENCHMARKS, ids=lambda path: path.stem)
def test_a_benchmark_runs_in_its_smoke_mode_and_gives_no_figures(
    path: Path, tmp_path: Path
) -> None:
    """Run in another folder: benchmarks that start themselves as a process must work there too."""
    result = subprocess.run(
        [sys.executable, path, "--smoke"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
        timeout=880,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    first, command, *printed = result.stdout.splitlines()
    assert first.startswith(f"smoke run of {path.name}: ")
    assert command.startswith(f"$ {path.name}")
    assert printed
    assert "#" in "".join(printed)
    assert not re.search(r"\d", "".join(printed))
    assert not list(tmp_path.iterdir())


def test_widths_that_cannot_be_compared_are_refused() -> None:
    command = [sys.executable, _FOLDER / "coordinate_check.py", "--widths", "64,b"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)

    assert result.returncode == 2, result.stderr
    assert "list of two or more different multiples of 16" in result.stderr


def test_a_benchmark_that_fails_fails_in_its_smoke_mode_too(tmp_path: Path) -> None:
    path = tmp_path / "one.py"
    path.write_text(
        "import click\nfrom smoke import Benchmark\n"
        "@click.command(cls=Benchmark, smoke='--tokens 7 {file}')\n"
        "@click.option('--tokens', type=int)\n"
        "@click.argument('file')\n"
        "def main(tokens, file):\n"
        "    print('measured', tokens, open(file).readable())\n"
        "    raise SystemExit(tokens)\n"
        "main()\n"
    )

    result = subprocess.run(
        [sys.executable, path, "--smoke"],
        env={"PYTHONPATH": str(_FOLDER)},
        capture_output=True,
        text=True,
        check=False,
    )

    assert result.returncode == 7, result.stderr
    assert result.stdout.splitlines()[-1] == "measured # True"
