"""`zero.hierarchical` with 4 ranks as 2 nodes of 2, against sharding over all of them."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from torch import Tensor

from megaback.checkpoints.checkpoint import read_meta, saved_state
from megaback.run_folder import CHECKPOINTS_FOLDER, step_name
from tests.helpers.paths import ROOT
from tests.helpers.tiny_run import curve_of, tiny_config, training_environment

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]

STEPS = 4
TOLERANCE = 1e-5
FLAT, BY_NODE = "zero.hierarchical=false", "zero.hierarchical=true"
ADAMW, MUON = "optimizer.name=adamw", "optimizer.name=muon"
HALF = f"training.steps={STEPS // 2}"


def stage(number: int) -> str:
    return f"zero.stage={number}"


WAYS = [
    (ADAMW, stage(2)),
    (ADAMW, stage(3), "zero.reduce_once=true", "training.activation_checkpointing=selective"),
    (MUON, stage(1), "zero.reduction=reduce", "zero.overlap_communication=true"),
    (MUON, stage(2), "zero.reduce_once=true", "training.activation_checkpointing=block"),
    (MUON, stage(2)),
    (MUON, stage(3)),
]
Part = tuple[int, int, tuple[str, ...]]
"""Ranks, ranks of a node, and settings."""
RESUMED: dict[str, tuple[Part, Part]] = {
    "same": ((4, 2, (stage(2), BY_NODE)), (4, 2, (stage(2), BY_NODE))),
    "fewer, flat": ((4, 2, (stage(1), BY_NODE)), (2, 2, (stage(3), FLAT))),
    "by node": ((4, 2, (stage(3), FLAT)), (4, 2, (stage(2), BY_NODE))),
    "copies": ((2, 2, (stage(2), FLAT)), (4, 2, (stage(3), BY_NODE))),
    "other nodes": ((4, 2, (stage(3), BY_NODE)), (4, 1, (stage(1), BY_NODE))),
}
"""Parts of a run: before and after its resume."""


@dataclass(frozen=True)
class Runs:
    """Finished runs, in a folder."""

    folder: Path

    def losses(self, name: str) -> list[float]:
        return curve_of(self.folder / name)

    def norms(self, name: str) -> list[float]:
        return curve_of(self.folder / name, "gradient_norm")

    def state(self, name: str) -> dict[tuple[str, str], Tensor]:
        """Weights and optimizer state of the last checkpoint, by kind and parameter."""
        target = self.folder / name / CHECKPOINTS_FOLDER / step_name(STEPS)
        meta = read_meta(target)
        saved, found = saved_state(target, meta), {}
        for key, series in (meta.runs or {}).items():
            kind, _, parameter = key.partition(":")
            whole = torch.empty(sum(ranks * length for _, ranks, _, length in series))
            saved.read(kind, parameter, 0, whole)
            found[kind, parameter] = whole
        return found


def name_of(*settings: str) -> str:
    return " ".join(settings).replace("=", "-")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_shards: Path) -> Runs:
    """All runs, in one process after another, which imports torch and DeepSpeed once."""
    folder = tmp_path_factory.mktemp("hierarchy")
    fields = tiny_config(tiny_shards)
    # Stage 3 does not shard parameters below 100,000 elements.
    fields["model"]["mlp_width"] = 4096
    fields["batch"]["micro_batch_rows"] = 1  # two micro-batches per step and rank
    fields["optimizer"] |= {"warmup_steps": 2, "final_learning_rate_ratio": 1.0}
    fields["training"]["steps"] = STEPS
    fields["validation"] = {}
    fields["checkpoint"] = {}
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(fields))

    def run(name: str, *settings: str) -> list[str]:
        return [f"run={folder / name}", *settings]

    jobs = [(4, 2, [run(name_of(one, FLAT), one, stage(1), FLAT) for one in (ADAMW, MUON)])]
    jobs[0][2].extend(run(name_of(*way), *way, BY_NODE) for way in WAYS)
    for part, length in ((0, (HALF,)), (1, ())):
        shared: dict[tuple[int, int], list[list[str]]] = {}
        for name, parts in RESUMED.items():
            ranks, per_node, settings = parts[part]
            shared.setdefault((ranks, per_node), []).append(run(name, MUON, *settings, *length))
        jobs += [(*size, of_size) for size, of_size in shared.items()]
    finished = subprocess.run(
        [sys.executable, "-m", "tests.helpers.forked_runs", config, json.dumps(jobs)],
        env={**training_environment(), "DS_ACCELERATOR": "cpu", "PYTHONWARNINGS": "ignore"},
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
        timeout=280,
    )
    assert finished.returncode == 0, finished.stderr
    return Runs(folder)


@pytest.mark.parametrize("way", WAYS, ids=" ".join)
def test_losses_norms_and_state_are_those_of_sharding_over_all_ranks(
    way: tuple[str, ...], runs: Runs
) -> None:
    flat, by_node = name_of(way[0], FLAT), name_of(*way)

    assert len(runs.losses(by_node)) == STEPS
    assert runs.losses(by_node) == pytest.approx(runs.losses(flat), abs=TOLERANCE)
    assert runs.norms(by_node) == pytest.approx(runs.norms(flat), abs=TOLERANCE)
    expected, found = runs.state(flat), runs.state(by_node)
    assert found.keys() == expected.keys()
    for key, whole in expected.items():
        torch.testing.assert_close(found[key], whole, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", RESUMED)
def test_a_run_resumes_with_other_shard_groups_ranks_and_stages(name: str, runs: Runs) -> None:
    expected = runs.losses(name_of(MUON, FLAT))

    assert runs.losses(name) == pytest.approx(expected, abs=TOLERANCE)


def test_a_run_resumes_bit_for_bit(runs: Runs) -> None:
    uninterrupted = name_of(MUON, stage(2))

    assert runs.losses("same") == runs.losses(uninterrupted)
    expected, found = runs.state(uninterrupted), runs.state("same")
    assert all(torch.equal(found[key], whole) for key, whole in expected.items())
