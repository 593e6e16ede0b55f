"""Runs whose ranks have parts of rows, against the same runs with whole rows."""

from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest
import torch

from megaback.tracking.samples_log import read_samples
from megaback.weights.source import open_checkpoint
from tests.helpers.tiny_run import curve_of, metrics_of
from tests.helpers.warm_ranks import WarmRanks

pytestmark = pytest.mark.slow

STEPS = 5
SHORT = (
    "training.loss_chunk_tokens=48",
    "optimizer.warmup_steps=0",
    "optimizer.final_learning_rate_ratio=1",
    "optimizer.z_loss=0.01",
    f"validation.every_steps={STEPS}",
    'validation.samples=["The end"]',
    "validation.sample_tokens=4",
    "checkpoint.every_steps=null",
    "hardware.preflight=off",
)
WHOLE = f"training.steps={STEPS}"
MUON = ("optimizer.name=muon",)
DOCUMENTS = ("data.rows=documents", "data.direction=both")
TOLERANCE = 1e-5

Train = Callable[..., Path]
RanksOf = Callable[[int], WarmRanks]


def divided(parts: int) -> str:
    return f"batch.sequence_parallel={parts}"


@pytest.fixture(scope="module")
def ranks_of(warm_ranks: RanksOf) -> Iterator[RanksOf]:
    """`ranks_of(world_size)`: two ranks of the session, or four of this module."""
    four = WarmRanks(4)
    yield lambda size: four if size == 4 else warm_ranks(size)
    four.close()


@pytest.fixture(scope="module")
def train(ranks_of: RanksOf, config_path: Path) -> Train:
    """`train(world_size, run, *overrides)`: train in a folder, or continue there."""

    def trained(size: int, run: Path, *overrides: str) -> Path:
        ranks_of(size).train(config_path, (f"run={run}", *SHORT, *overrides), run / "output.txt")
        return run

    return trained


@pytest.fixture(scope="module")
def run_of(train: Train, tmp_path_factory: pytest.TempPathFactory) -> Train:
    """`run_of(world_size, *overrides)`: the folder of a finished run, trained once."""

    @cache
    def finished(size: int, *overrides: str) -> Path:
        return train(size, tmp_path_factory.mktemp("runs") / "run", WHOLE, *overrides)

    return finished


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    source = open_checkpoint(run / "checkpoints" / f"step-{STEPS:08d}")
    return {name: source.read(name) for name in source.shapes}


def assert_same(found: Path, expected: Path) -> None:
    assert read_samples(found) == read_samples(expected)
    for name in ("loss", "gradient_norm", "val_loss"):
        assert curve_of(found, name) == pytest.approx(curve_of(expected, name), abs=TOLERANCE)
    others = weights_of(expected)
    for name, weight in weights_of(found).items():
        torch.testing.assert_close(weight, others[name], rtol=0.0, atol=TOLERANCE, msg=name)


@pytest.mark.parametrize(
    ("parts", "same", "ways"),
    [
        (2, (), ("zero.stage=0",)),
        (4, (), ("zero.stage=2", "training.activation_checkpointing=selective")),
        (
            2,
            (),
            ("zero.stage=3", "zero.reduce_once=true", "training.activation_checkpointing=block"),
        ),
        (2, MUON, ("zero.stage=1", "training.activation_checkpointing=block")),
        (4, MUON, ("zero.stage=3",)),
        (4, DOCUMENTS, ("zero.stage=1",)),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_four_ranks_train_the_same_with_parts_of_rows(
    parts: int, same: tuple[str, ...], ways: tuple[str, ...], run_of: Train
) -> None:
    run = run_of(4, divided(parts), *same, *ways)

    assert_same(run, run_of(4, *same))
    assert f" {4 // parts} groups of {parts} ranks x " in (run / "output.txt").read_text()


def test_val_losses_by_context_and_direction_are_those_of_whole_rows(run_of: Train) -> None:
    found, expected = (
        [
            number
            for line in metrics_of(run)
            for table in (line.get("val_by_context", {}), line.get("val_by_direction", {}))
            for part in table.values()
            for number in part.values()
        ]
        for run in (run_of(4, divided(4), *DOCUMENTS, "zero.stage=1"), run_of(4, *DOCUMENTS))
    )

    assert len(found) > 12
    assert found == pytest.approx(expected, abs=TOLERANCE)


def test_a_run_in_parts_resumes_bit_for_bit(run_of: Train, train: Train, tmp_path: Path) -> None:
    uninterrupted = run_of(2, divided(2))

    run = train(2, tmp_path / "run", divided(2), "training.steps=3")
    train(2, run, divided(2), WHOLE)

    for name in ("loss", "gradient_norm"):
        assert curve_of(run, name) == curve_of(uninterrupted, name)
    others = weights_of(uninterrupted)
    assert all(torch.equal(weight, others[name]) for name, weight in weights_of(run).items())


def test_a_run_resumes_with_other_parts_and_ranks(
    run_of: Train, train: Train, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    for step, (size, parts) in enumerate([(4, 4), (2, 2), (4, 2), (2, 1), (4, 4)], start=1):
        train(size, run, divided(parts), f"training.steps={step}")

    assert curve_of(run) == pytest.approx(curve_of(run_of(2, divided(2))), abs=TOLERANCE)
    assert curve_of(run) == pytest.approx(curve_of(run_of(4)), abs=TOLERANCE)
