"""The GPU test as a process: smoke mode, and a part by itself."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.paths import ROOT

pytestmark = pytest.mark.slow


def gpu_test(*words: object, **options: Any) -> "subprocess.CompletedProcess[str]":
    command = [sys.executable, "-m", "benchmarks.gpu_test", *map(str, words)]
    return subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=280, **options
    )


def test_the_parts_without_ranks_pass_in_smoke_mode() -> None:
    done = gpu_test("--smoke")

    assert done.returncode == 0, done.stdout + done.stderr
    assert "failed" not in done.stdout
    words = ("sdpa, uneven documents", "ZeRO 1, muon", "xcoax_100bt", "one row", "chunks", "fp32")
    assert [word for word in words if word not in done.stdout] == []


def test_a_part_without_a_gpu_reports_what_wants_one(tmp_path: Path) -> None:
    without = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
    done = gpu_test("--out", tmp_path, "--parts", "attention", "--size", "smoke", env=without)

    assert done.returncode == 0, done.stdout + done.stderr
    (part,) = json.loads((tmp_path / "report.json").read_text())["parts"]
    assert (part["name"], part["status"]) == ("attention", "passed")
    text = (tmp_path / "report.md").read_text()
    assert "nothing below was measured on a GPU" in text
    assert "**ran on a CPU, and wants a GPU**: `hardware.attention`" in text
    assert {path.name for path in tmp_path.iterdir()} == {
        *(".gpu-test", "logs.txt", "report.json", "report.md"),
    }
