"""Ranks that outnumber matrices and the files that a process may usually open."""

import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment

pytestmark = pytest.mark.slow

_LIMIT = 40
"""Files that a rank may open at first; the first of 9 ranks has 50 open, of 512 over 1,500."""


def test_nine_ranks_with_a_low_limit_of_open_files_share_out_matrices_and_checkpoints(
    tmp_path: Path,
) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    ranks = subprocess.run(
        [sys.executable, "-m", "tests.helpers.many_ranks", "9", tmp_path],
        env={**training_environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=200,
        preexec_fn=partial(resource.setrlimit, resource.RLIMIT_NOFILE, (_LIMIT, hard)),
    )
    assert ranks.returncode == 0, ranks.stderr
