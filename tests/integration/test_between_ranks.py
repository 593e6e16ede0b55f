"""Real ranks agree, exchange nothing pickled, and other machines cannot connect to them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.ranks.local import rank_environment, rank_names
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sealed(config_path: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of two ranks that trained without pickle, and the output of the first."""
    folder = tmp_path_factory.mktemp("sealed")
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.sealed_rank", config_path, folder],
            env=training_environment() | rank_environment(2) | names,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=ROOT,
        )
        for names in rank_names(2)
    ]
    said = [rank.communicate(timeout=100) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(error for _, error in said)
    return folder, said[0][0]


def test_runs_start_save_and_resume_without_unpickling(
    sealed: tuple[Path, str],
) -> None:
    assert json.loads(sealed[1]) == {"2": [75, 0], "3": [75, 0]}


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_of_one_machine_listen_on_loopback_only(sealed: tuple[Path, str], rank: int) -> None:
    addresses = (sealed[0] / f"listening-{rank}").read_text().split()
    assert addresses
    assert {address.rpartition(":")[2].split(".")[0] for address in addresses} <= {"127", "1"}


def test_ranks_agree_on_numbers_errors_and_batches() -> None:
    ranks = subprocess.run(
        [sys.executable, "-m", "tests.helpers.agreeing_ranks"],
        env={**training_environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=100,
    )
    assert ranks.returncode == 0, ranks.stderr
    errors = [line for line in ranks.stderr.splitlines() if "error:" in line]
    assert [line.partition("error: ")[2] for line in errors] == ["of rank 1", "a damaged frame"]
