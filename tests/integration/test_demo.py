"""`make demo`'s program: every command of it, with a small model for a few steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment
from tests.helpers.warm_start import COLD_VARIABLE

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_the_demo_goes_from_text_to_samples(tmp_path: Path, tiny_text_folder: Path) -> None:
    out = tmp_path / "demo"
    sizes = ("model.num_layers=1", "model.width=32", "hardware.processes=1")
    words = ("--out", out, "--source", tiny_text_folder, "--vocab-size", "600")

    result = subprocess.run(
        [sys.executable, "-m", "tools.demo", *words, *sizes, "training.steps=2"],
        cwd=ROOT,
        env=training_environment() | {COLD_VARIABLE: "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    printed = result.stdout.splitlines()
    commands = [line for line in printed if line.startswith("$ megaback ")]
    assert len(commands) == 8
    samples = printed[printed.index(commands[5]) :]
    assert max(len(line) for line in samples if not line.startswith(("$ ", "next: "))) <= 80
    assert any(line.startswith("A GPT that writes backwards") for line in samples)
    assert not [line for line in printed if line.startswith("{")]  # JSON is in metrics.jsonl
    of_steps = [line.split()[2] for line in printed if line.startswith("step ")]
    assert of_steps == ["val", "measuring", "loss", "val", "measuring"]
    assert sum(line.startswith("next: ") for line in printed) == 1
    assert {path.name for path in out.iterdir()} == {"tokenizer", "shards", "run", "model"}
