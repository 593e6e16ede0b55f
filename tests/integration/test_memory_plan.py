"""Memory predicted by `megaback plan` agrees with that of a real run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.paths import ROOT

MAX_DIFFERENCE = 0.1


@pytest.mark.slow
def test_the_memory_of_a_real_run_is_within_10_percent_of_the_plan(tiny_shards: Path) -> None:
    benchmark = [sys.executable, ROOT / "benchmarks" / "memory.py", "--shards", tiny_shards]

    done = subprocess.run(
        [*benchmark, "--ranks=1", "--only=1-muon-none-fp32-2", "--json"],
        capture_output=True,
        text=True,
        timeout=200,
    )

    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name in ("training", "whole"):
        ratio = found[f"planned_{name}_bytes"] / found[f"{name}_bytes"]
        assert abs(ratio - 1) < MAX_DIFFERENCE, found
