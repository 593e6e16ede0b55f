"""Branches as real runs: they continue a checkpoint, in whole or in part."""

import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.errors import ConfigError
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec
from megaback.branches import recorded_branch_point
from megaback.checkpoints.checkpoint import find_checkpoint
from megaback.run_folder import BASE_FOLDER, CHECKPOINTS_FOLDER, complete_checkpoints, step_name
from tests.helpers.tiny_run import (
    curve_of,
    metrics_of,
    training_environment,
    val_losses_of,
    wait_for_step,
)
from tests.helpers.warm_ranks import WarmRanks

pytestmark = pytest.mark.slow

RunOf = Callable[..., Path]
SHORT = ("training.steps=20", "checkpoint.every_steps=10", "validation.every_steps=10")


@pytest.fixture(scope="module")
def trunk(run_of: RunOf) -> Path:
    """A run of 20 steps on two ranks."""
    return run_of(*SHORT)


@pytest.fixture(scope="module")
def half(trunk: Path) -> Path:
    """The trunk's checkpoint of step 10."""
    return trunk / CHECKPOINTS_FOLDER / step_name(10)


def test_a_branch_that_changes_nothing_repeats_its_trunk(
    trunk: Path, half: Path, run_of: RunOf
) -> None:
    branch = run_of(*SHORT, f"branch_from={half}")

    assert curve_of(branch) == curve_of(trunk)
    since = [line for line in metrics_of(trunk) if line["step"] > 10 or "val_loss" in line]
    assert [line for line in metrics_of(branch) if line["step"] > 10 or "val_loss" in line] == (
        since[1:]  # without that at the trunk's start
    )
    point = recorded_branch_point(branch)
    assert point is not None
    assert (point.checkpoint, point.trunk_step) == (str(half), 10)


def test_ranks_fetch_a_copy_at_a_url_together(
    trunk: Path, half: Path, run_of: RunOf, tmp_path: Path
) -> None:
    shutil.copytree(half, tmp_path / "copies" / half.name)

    branch = run_of(*SHORT, f"branch_from=local://{tmp_path}/copies")  # file:// is read in place

    assert find_checkpoint(branch)[1].files == find_checkpoint(trunk)[1].files
    assert not (branch / BASE_FOLDER).exists()


def test_a_branch_that_keeps_the_weights_alone_is_a_run_of_init_from(
    half: Path, run_of: RunOf
) -> None:
    branch = run_of(*SHORT, f"branch_from={half}", "keep=[weights]", "training.steps=5")
    run = run_of(*SHORT, f"init_from={half}", "training.steps=5")

    assert metrics_of(branch) == metrics_of(run)


def test_an_anneal_on_other_data_continues_moments_and_schedule(
    half: Path,
    tiny_text_folder: Path,
    codec: Callable[..., TextCodec],
    run_of: RunOf,
    tmp_path: Path,
) -> None:
    settings = BuildSettings(
        sources=(WeightedSource(str(tiny_text_folder / "a.jsonl")),),
        tokenizer_sha256=codec().format.tokenizer_sha256,
        val_fraction=0.1,
        frame_tokens=1024,
    )
    build_shards(settings, codec(), tmp_path / "shards", workers=1)

    branch = run_of(
        *SHORT,
        f"branch_from={half}",
        "keep=[weights, optimizer, schedule]",
        f"data.shards={tmp_path / 'shards'}",
        "optimizer.schedule=linear",
        "optimizer.final_learning_rate_ratio=0",
    )

    rates = curve_of(branch, "learning_rate")
    assert rates == sorted(rates, reverse=True)
    assert (len(rates), rates[-1]) == (10, 0.0)
    assert find_checkpoint(branch)[1].updates == 20
    losses = val_losses_of(branch)
    assert list(losses) == [10, 20]
    assert losses[20] < losses[10]


def test_a_branch_with_a_larger_batch_counts_on_from_the_tokens_of_its_trunk(
    half: Path, run_of: RunOf
) -> None:
    branch = run_of(*SHORT, f"branch_from={half}", "batch.global_batch_rows=16")

    tokens = curve_of(branch, "tokens_seen")
    assert tokens[-11:] == [8 * 64 * 10 + 16 * 64 * step for step in range(11)]
    assert "20 steps = 15,360 tokens" in (branch / "output.txt").read_text()


def test_a_killed_branch_resumes_without_its_trunk(
    half: Path,
    run_of: RunOf,
    config_path: Path,
    warm_ranks: Callable[[int], WarmRanks],
    tmp_path: Path,
) -> None:
    constant = "optimizer.final_learning_rate_ratio=1"
    undisturbed = run_of(*SHORT, f"branch_from={half}", constant)
    copied = tmp_path / "trunk" / CHECKPOINTS_FOLDER / half.name
    shutil.copytree(half, copied)
    run = tmp_path / "branch"
    options = ("checkpoint.every_steps=null", f"branch_from={copied}", constant)
    rank = [sys.executable, "-m", "megaback.train", config_path, f"run={run}", *options]
    process = subprocess.Popen(
        [*rank, "training.steps=2000"],
        stdout=(tmp_path / "output.txt").open("w"),
        stderr=subprocess.STDOUT,
        text=True,
        env=training_environment(),
    )
    wait_for_step(process, run, 3, tmp_path / "output.txt")
    process.send_signal(signal.SIGKILL)
    process.wait()
    shutil.rmtree(tmp_path / "trunk")
    assert [path.name for path in complete_checkpoints(run)] == [half.name]

    overrides = (f"run={run}", *options, "training.steps=20")
    warm_ranks(2).train(config_path, overrides, run / "output.txt")

    assert curve_of(run) == pytest.approx(curve_of(undisturbed)[-10:], abs=1e-4)


def test_a_branch_that_cannot_begin_is_refused_before_any_rank_starts(
    half: Path, train: Callable[..., "subprocess.CompletedProcess[str]"], tmp_path: Path
) -> None:
    refused = train(tmp_path / "run", f"branch_from={half}", "training.steps=10")

    assert refused.returncode == ConfigError.exit_code
    assert "raise training.steps, or count steps from 0: keep=[weights, optimizer, data]" in (
        refused.stderr
    )
    assert not (tmp_path / "run").exists()
