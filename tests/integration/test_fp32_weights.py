"""The fp32 weights of a run in bf16 begin as the initial weights, not rounded to bf16."""

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("world_size", [1, 2])
def test_fp32_weights_are_bitwise_the_initial_ones(
    world_size: int,
    tmp_path: Path,
    config_path: Path,
    run_of: Callable[..., Path],
    model_of: Callable[[Path], Path],
) -> None:
    base = model_of(run_of("zero.stage=1"))

    ranks = subprocess.run(
        [
            *(sys.executable, "-m", "tests.helpers.masters_worker"),
            *(str(world_size), config_path, tmp_path, base),
        ],
        env={**training_environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=200,
    )

    assert ranks.returncode == 0, ranks.stderr
