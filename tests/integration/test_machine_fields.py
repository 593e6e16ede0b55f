"""Machine metrics are those of the slowest or fullest rank, whichever it is."""

import subprocess
import sys
from pathlib import Path

import pytest

from launcher.ranks.local import rank_environment, rank_names
from megaback.tracking.metrics import read_metrics
from tests.helpers.tiny_run import training_environment
from tools.watch import health_of

pytestmark = pytest.mark.slow

WAIT_S = 0.2
FORWARD_S = 0.15
MORE_BYTES = 600_000_000
# Rank 1 has a slow loader, a slow device and much memory in use.
RANK = f"""
import os, time
from data_pipeline.loading.loader import TrainingLoader
from megaback.model.gpt import ReverseGPT
from megaback.train import main
quick = TrainingLoader.at
def slow(self, step):
    time.sleep({WAIT_S})
    return quick(self, step)
compute = ReverseGPT.forward
def slower(self, *arguments):
    time.sleep({FORWARD_S})
    return compute(self, *arguments)
if os.environ["RANK"] == "1":
    ReverseGPT.forward = slower
    TrainingLoader.at = slow
    held = bytearray({MORE_BYTES})
main()
"""


def test_the_longest_wait_the_largest_memory_and_the_slowest_rank_are_reported(
    tmp_path: Path, config_path: Path
) -> None:
    environment = training_environment() | rank_environment(2)
    options = (
        f"run={tmp_path / 'run'}",
        "training.steps=7",
        "zero.stage=3",
        "logging.rank_times=true",
    )
    ranks = [
        subprocess.Popen(
            [sys.executable, "-c", RANK, config_path, *options],
            env=environment | names,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for names in rank_names(2)
    ]
    outputs = [rank.communicate(timeout=120)[0] for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs

    lines = [line for line in read_metrics(tmp_path / "run") if "loss" in line]
    assert len(lines) == 7
    for line in lines:
        assert WAIT_S / 2 < line["data_wait_share"] * line["step_s"] <= line["step_s"]
        assert line["tokens_per_s_per_device"] == line["tokens_per_s"] / 2
        assert MORE_BYTES < line["memory_peak_bytes"] < 3 * MORE_BYTES
    # At stage 3 both ranks wait for each other in the forward passes, of which each step has two.
    assert "slowest_rank" not in lines[0]
    assert (health_of(tmp_path / "run").slow_rank or "").startswith("rank 1 is the slowest in ")
    slow = [line for line in lines[1:] if line["slowest_rank"] == 1]
    assert min(line["slowest_forward_s"] for line in slow) > 2 * FORWARD_S
    lags_s = sorted(line["forward_lag_s"] for line in slow)
    assert FORWARD_S < lags_s[len(lags_s) // 2] < 3 * FORWARD_S
