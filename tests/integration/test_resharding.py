"""A checkpoint resumes with any number of ranks at any ZeRO stage."""

import json
import subprocess
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import tiny_config, training_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

_WORKER = "tests.helpers.reshard_worker"
_NAMES = ("adamw", "muon")
_FP32_TOLERANCE = 1e-4
_SAME = [(stage, stage) for stage in range(4)]
_SOME = [*_SAME, (0, 3), (1, 3), (2, 0), (3, 2)]
# Stages 1 and 2 share their code: between it, stage 0's and stage 3's, these are all directions.
_PAIRS = {(2, 2): [*_SOME, (0, 1), (3, 0)], (2, 1): _SOME, (1, 2): _SOME, (2, 4): _SAME}
"""Pairs of stages, by the number of ranks that save and that load."""
Losses = dict[tuple[str, int, int], list[float]]
"""Losses by optimizer, stage that saved, and stage that resumed."""
Job = tuple[Path, int, str, list[tuple[int, int]], list[str]]
"""Config, world size, action, pairs of stages, and names, as the worker reads them."""


def work(jobs: dict[str, Job]) -> dict[str, Losses]:
    """Run jobs of the worker one after another; returns the losses of each."""
    ranks = subprocess.run(
        [sys.executable, "-m", _WORKER, json.dumps([*jobs.values()], default=str)],
        env={**training_environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=580,
    )
    assert ranks.returncode == 0, ranks.stdout
    lines = iter(json.loads(one) for one in ranks.stdout.splitlines() if one.startswith("["))
    return {
        key: {
            (name, saved, stage): losses
            for name, saved, stage, losses in islice(lines, len(pairs) * len(names))
        }
        for key, (_, _, _, pairs, names) in jobs.items()
    }


def names_of(before: int, after: int) -> list[str]:
    """Runs that are saved by `before` ranks and loaded by `after`."""
    # Muon's runs also have AdamW's state, for parameters that are not matrices.
    return [f"{before}-{name}" for name in _NAMES if before == after or name == "muon"]


@pytest.fixture(scope="module")
def losses(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> dict[str, Losses]:
    """Losses of all jobs, from one worker, which imports torch and DeepSpeed once."""

    def write(name: str, **changes: Any) -> Path:
        path = tmp_path_factory.mktemp(name) / "config.yaml"
        path.write_text(yaml.safe_dump(tiny_config(tiny_shards) | changes))
        return path

    config = write("resharding")
    # Nearly all elements are of three matrices, which four ranks share.
    few = write(
        "few_matrices",
        model={"num_layers": 1, "width": 16, "num_heads": 2, "mlp_width": 1024},
        batch={"context_tokens": 16, "global_batch_rows": 12, "micro_batch_rows": 1},
    )
    return work(
        {
            **{
                # The worker checks that the other optimizer refuses a state.
                f"saved by {size}": (config, size, "save", _SAME, names_of(size, size))
                for size in (1, 2)
            },
            **{
                f"{before}-{after}": (config, after, "load", pairs, names_of(before, after))
                for (before, after), pairs in _PAIRS.items()
            },
            "sharded": (few, 4, "save", [(1, 1), (2, 2)], ["4-muon"]),
            "offloaded": (few, 4, "save", [(1, 1)], ["4-muon-optimizer"]),
            "resumed": (few, 4, "load", [(1, 2)], ["4-muon-optimizer"]),
            "whole": (few, 3, "load", [(1, 0)], ["4-muon"]),
        }
    )


@pytest.mark.parametrize(("before", "after"), _PAIRS)
def test_a_checkpoint_resumes_at_other_stages_with_the_same_or_other_ranks(
    before: int, after: int, losses: dict[str, Losses]
) -> None:
    uninterrupted, went_on = losses[f"saved by {before}"], losses[f"{before}-{after}"]

    pairs = _PAIRS[before, after]
    assert went_on.keys() == {(name, *pair) for name in names_of(before, after) for pair in pairs}
    for (name, saved_stage, _), of_pair in went_on.items():
        assert of_pair == pytest.approx(
            uninterrupted[name, saved_stage, saved_stage], abs=_FP32_TOLERANCE
        )


def test_muon_on_a_rank_that_owns_no_matrix(losses: dict[str, Losses]) -> None:
    (expected,) = losses["whole"].values()
    found = [losses[name] for name in ("sharded", "offloaded", "resumed")]

    for of_pair in (one for of_job in found for one in of_job.values()):
        assert of_pair == pytest.approx(expected, abs=_FP32_TOLERANCE)
