"""A checkpoint resumes with any number of ranks at any ZeRO stage."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import pytest
import yaml

from data_pipeline.errors import PreemptedError
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import curve_of, tiny_config, training_environment, wait_for_step

pytestmark = pytest.mark.slow

_WORKER = "tests.helpers.reshard_worker"
_NAMES = ("adamw", "muon")
_FP32_TOLERANCE = 1e-4
_SAME = [(stage, stage) for stage in range(4)]
_ALL = [(saved, stage) for saved in range(4) for stage in range(4)]
_SOME = [*_SAME, (0, 3), (1, 3), (2, 0), (3, 2)]
Losses = dict[tuple[str, int, int], list[float]]
"""Losses by optimizer, stage that saved, and stage that resumed."""
Job = tuple[int, str, list[tuple[int, int]], list[str]]
"""World size, action, pairs of stages, and names, as the worker reads them."""


def work(config: Path, *jobs: Job) -> list[Losses]:
    """Run jobs of the worker one after another; returns the losses of each."""
    ranks = subprocess.run(
        [sys.executable, "-m", _WORKER, config, config.parent, json.dumps(jobs)],
        env={**training_environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=200,
    )
    assert ranks.returncode == 0, ranks.stdout
    lines = iter(json.loads(one) for one in ranks.stdout.splitlines() if one.startswith("["))
    return [
        {
            (name, saved, stage): losses
            for name, saved, stage, losses in islice(lines, len(pairs) * len(names))
        }
        for _, _, pairs, names in jobs
    ]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Path:
    path = tmp_path_factory.mktemp("resharding") / "config.yaml"
    fields = tiny_config(tiny_shards)
    fields["batch"]["micro_batch_rows"] = 1
    path.write_text(yaml.safe_dump(fields))
    return path


@pytest.fixture(scope="module")
def saved(config: Path) -> Callable[[int], Losses]:
    """`saved(world_size)`: losses of uninterrupted runs at every stage."""
    found: dict[int, Losses] = {}

    def of(world_size: int) -> Losses:
        if world_size not in found:
            names = [f"{world_size}-{name}" for name in _NAMES]
            (found[world_size],) = work(config, (world_size, "save", _SAME, names))
        return found[world_size]

    return of


@pytest.mark.parametrize(
    ("before", "after", "pairs"),
    [(2, 2, _ALL), (2, 1, _SOME), (1, 2, _SOME), (2, 4, _SOME)],
    ids=["2-2", "2-1", "1-2", "2-4"],
)
def test_a_checkpoint_resumes_at_other_stages_with_the_same_or_other_ranks(
    before: int,
    after: int,
    pairs: list[tuple[int, int]],
    config: Path,
    saved: Callable[[int], Losses],
) -> None:
    uninterrupted = saved(before)
    # Muon's runs also have AdamW's state, for parameters that are not matrices.
    names = [f"{before}-{name}" for name in _NAMES if before == after or name == "muon"]

    # The worker checks that the other optimizer refuses a state.
    (went_on,) = work(config, (after, "load", pairs, names))

    assert went_on.keys() == {(name, *pair) for name in names for pair in pairs}
    for (name, saved_stage, _), losses in went_on.items():
        assert losses == pytest.approx(
            uninterrupted[name, saved_stage, saved_stage], abs=_FP32_TOLERANCE
        )


def test_muon_on_a_rank_that_owns_no_matrix(tmp_path: Path, tiny_shards: Path) -> None:
    fields = tiny_config(tiny_shards)
    # Nearly all elements are of three matrices, which four ranks share.
    fields["model"] = {"num_layers": 1, "width": 16, "num_heads": 2, "mlp_width": 1024}
    fields["batch"] = {"context_tokens": 16, "global_batch_rows": 12, "micro_batch_rows": 1}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(fields))

    sharded, offloaded, resumed, whole = work(
        config,
        (4, "save", [(1, 1), (2, 2)], ["4-muon"]),
        (4, "save", [(1, 1)], ["4-muon-optimizer"]),
        (4, "load", [(1, 2)], ["4-muon-optimizer"]),
        (3, "load", [(1, 0)], ["4-muon"]),
    )

    (expected,) = whole.values()
    for losses in (*sharded.values(), *offloaded.values(), *resumed.values()):
        assert losses == pytest.approx(expected, abs=_FP32_TOLERANCE)


def test_the_command_resumes_with_fewer_ranks_at_another_stage(
    tmp_path: Path,
    start_training: Callable[..., "subprocess.Popen[str]"],
    train_one_rank: Callable[..., "subprocess.CompletedProcess[str]"],
    run_of: Callable[..., Path],
) -> None:
    run = tmp_path / "run"
    process = start_training(run, "zero.stage=1")
    wait_for_step(process, run, 30)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == PreemptedError.exit_code

    result = train_one_rank(run, "zero.stage=3")

    assert result.returncode == 0, result.stderr
    assert "of 2 ranks at ZeRO stage 1 is resumed with 1 ranks at stage 3" in result.stderr
    assert curve_of(run) == pytest.approx(curve_of(run_of("zero.stage=1")), abs=_FP32_TOLERANCE)
