"""`megaback sweep`: two real runs, of two ranks each, and their losses."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.tiny_run import training_environment, val_losses_of

pytestmark = pytest.mark.slow


def test_the_losses_are_those_of_the_runs(config_path: Path, tmp_path: Path) -> None:
    words = ("optimizer.learning_rate=1e-3,1e-2", "training.steps=2", "optimizer.warmup_steps=0")
    done = subprocess.run(
        [sys.executable, "-m", "megaback", "sweep", config_path, *words, "--out", "out"],
        cwd=tmp_path,
        env=training_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    settings = json.loads((tmp_path / "out" / "sweep.json").read_text())["settings"]
    assert {one["values"]["optimizer.learning_rate"]: one["loss"] for one in settings} == {
        rate: val_losses_of(tmp_path / "out" / f"learning_rate-{rate}")[2] for rate in (0.01, 0.001)
    }
    assert settings[0]["loss"] < settings[1]["loss"]
    assert "run 2 of 2: out/learning_rate-0.01" in done.stdout
