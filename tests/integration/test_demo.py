"""`make demo`'s program: every command of it, with a small model for a few steps."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import training_environment

pytestmark = pytest.mark.slow


@pytest.mark.timeout(600)
def test_the_demo_goes_from_text_to_samples(tmp_path: Path, tiny_text_folder: Path) -> None:
    out = tmp_path / "demo"
    sizes = ("model.num_layers=1", "model.width=32", "hardware.processes=1")
    words = ("--out", out, "--source", tiny_text_folder, "--vocab-size", "600")

    result = subprocess.run(
        [sys.executable, "-m", "tools.demo", *words, *sizes, "training.steps=2"],
        cwd=ROOT,
        env=training_environment(),
        capture_output=True,
        text=True,
        check=False,
        timeout=580,
    )

    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout
    assert said.count("$ megaback ") == 8
    assert "A GPT that writes backwards" in said
    assert "what came before" in said
    assert {path.name for path in out.iterdir()} == {"tokenizer", "shards", "run", "model"}
