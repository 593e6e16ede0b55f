"""A run with PyTorch's `varlen`, compiled as one graph, on a CPU with a stand-in kernel."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import (
    curve_of,
    read_run_config,
    train_plainly,
    training_environment,
    val_losses_of,
)

pytestmark = pytest.mark.slow

STEPS = 6
SHORT = (f"training.steps={STEPS}", "validation.every_steps=3", "checkpoint.every_steps=null")


@pytest.mark.parametrize("checkpointing", ["selective", "block"])
def test_a_compiled_run_with_varlen_has_the_losses_of_sdpa(
    checkpointing: str, config_path: Path, tiny_shards: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    options = (
        "hardware.attention=varlen",
        "hardware.processes=1",
        "hardware.collective_timeout_s=280",
        "training.compile=on",
        f"training.activation_checkpointing={checkpointing}",
    )
    result = subprocess.run(
        [
            *(sys.executable, "-m", "tests.helpers.varlen_on_cpu", config_path, f"run={run}"),
            *(*SHORT, *options),
        ],
        capture_output=True,
        text=True,
        check=False,
        env=training_environment() | {"PYTHONPATH": str(ROOT)},
        timeout=280,
    )

    assert result.returncode == 0, result.stderr
    assert "attention varlen, fp32 compiled" in result.stdout + result.stderr
    assert "compiled the model again" not in result.stderr
    assert len(val_losses_of(run)) == 3
    plain = train_plainly(read_run_config(tiny_shards, *SHORT))
    assert curve_of(run) == pytest.approx(plain.losses, abs=1e-5)
