"""Data order and count of steps of a branch: with another batch, and to another end."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import BatchError, ConfigError, MegabackError, RunMismatchError
from data_pipeline.shards.manifest import Manifest
from megaback.branches import BranchPoint
from megaback.config import Config, Kept
from megaback.data import Data, open_data
from tests.helpers.run_config import run_config

Leave = Callable[..., BranchPoint]


@pytest.fixture
def leave(tiny_shards: Path) -> Leave:
    """`leave(step, rows, kept)`: a point after steps of 8 rows of the tiny shards."""

    def make(
        step: int = 5,
        rows: int = 40,
        kept: tuple[Kept, ...] = ("weights", "optimizer", "schedule", "data"),
    ) -> BranchPoint:
        manifest = Manifest.load(tiny_shards)
        return BranchPoint(
            checkpoint="trunk/checkpoints/step-00000005",
            sha256="0" * 64,
            trunk_step=5,
            kept=kept,
            step=step,
            tokens=step * 8 * 64,
            rows=rows,
            order_rows=8,
            data_fingerprint=manifest.fingerprint,
            text_format=manifest.text_format.to_dict(),
        )

    return make


def config_with(shards: object, rows: int = 8, **sections: Any) -> Config:
    batch = {"context_tokens": 64, "global_batch_rows": rows, "micro_batch_rows": rows}
    return run_config(Path("run"), data={"shards": shards}, batch=batch, **sections)


def rows_of(data: Data, first: int, stop: int) -> list[tuple[int, int]]:
    """Frame and row of all rows of some steps, as the run counts them."""
    found = []
    for step in range(first, stop):
        _, frame, row = data.training.places(step + data.read_steps)
        found += list(zip(frame.tolist(), row.tolist(), strict=True))
    return found


@pytest.mark.parametrize("rows", [8, 16, 24, 64])
def test_a_branch_reads_the_rows_that_its_trunk_would_have_read_next(
    rows: int, leave: Leave, tiny_shards: Path
) -> None:
    trunk = open_data(config_with(str(tiny_shards)), 0, 1)
    branch = open_data(config_with(str(tiny_shards), rows), 0, 1, leave())
    num_steps = 2

    found = rows_of(branch, 5, 5 + num_steps)

    assert sorted(found) == sorted(rows_of(trunk, 5, 5 + num_steps * rows // 8))


def test_without_the_schedule_steps_begin_at_0_and_rows_continue(
    leave: Leave, tiny_shards: Path
) -> None:
    trunk = open_data(config_with(str(tiny_shards)), 0, 1)
    branch = open_data(config_with(str(tiny_shards)), 0, 1, leave(step=0))

    assert rows_of(branch, 0, 2) == rows_of(trunk, 5, 7)


def test_without_the_data_rows_restart(leave: Leave, tiny_shards: Path) -> None:
    point = leave(rows=0, kept=("weights", "optimizer", "schedule"))
    trunk = open_data(config_with(str(tiny_shards)), 0, 1)
    branch = open_data(config_with(str(tiny_shards)), 0, 1, point)

    assert rows_of(branch, 5, 7) == rows_of(trunk, 0, 2)


def test_a_batch_that_the_lanes_do_not_divide_is_refused(leave: Leave, tiny_shards: Path) -> None:
    with pytest.raises(BatchError, match=r"12 is not divisible by the trunk's 8 lanes.*keep=\["):
        open_data(config_with(str(tiny_shards), 12), 0, 1, leave())


def test_another_batch_of_a_mixture_is_refused_and_the_same_continues(
    leave: Leave, tiny_shards: Path
) -> None:
    mixed = [{"path": str(tiny_shards), "weight": 3}, {"path": str(tiny_shards)}]
    trunk = open_data(config_with(mixed), 0, 1)
    point = replace(leave(step=0), data_fingerprint=trunk.fingerprint)

    assert rows_of(open_data(config_with(mixed), 0, 1, point), 0, 2) == rows_of(trunk, 5, 7)
    with pytest.raises(BatchError, match="mixture in batches of 8 rows"):
        open_data(config_with(mixed, 16), 0, 1, point)


def test_another_batch_of_a_mixture_with_changing_weights_is_refused(
    leave: Leave, tiny_shards: Path
) -> None:
    """Each data set has all rows for a while."""
    one, other = (
        {"path": str(tiny_shards), "weight": part} for part in ({0: 1, 9: 0}, {0: 0, 9: 1})
    )
    section = {"shards": [one, other], "weight_positions": "tokens"}
    batch = {"context_tokens": 64, "global_batch_rows": 8, "micro_batch_rows": 8}
    config = run_config(Path("run"), data=section, batch=batch)
    point = replace(leave(), data_fingerprint=open_data(config, 0, 1).fingerprint)

    wide = config.model_copy(
        update={"batch": config.batch.model_copy(update={"global_batch_rows": 16})}
    )
    with pytest.raises(BatchError, match="mixture in batches of 8 rows"):
        open_data(wide, 0, 1, point)


def test_other_shards_are_refused_unless_the_data_restart(leave: Leave, tiny_shards: Path) -> None:
    other = replace(leave(), data_fingerprint="f" * 64)
    restarted = replace(other, rows=0, kept=("weights", "optimizer", "schedule"))

    with pytest.raises(RunMismatchError, match=r"keep=\[weights, optimizer, schedule\]"):
        open_data(config_with(str(tiny_shards)), 0, 1, other)
    assert open_data(config_with(str(tiny_shards)), 0, 1, restarted).read_steps == -5


def test_another_tokenizer_is_refused(leave: Leave, tiny_shards: Path) -> None:
    point = leave()
    text_format = point.text_format | {"tokenizer_sha256": "0" * 64}

    with pytest.raises(MegabackError, match=r"branch_from trunk.* was made with tokenizer 0000"):
        open_data(config_with(str(tiny_shards)), 0, 1, replace(point, text_format=text_format))


@pytest.mark.parametrize("rows", [8, 16])
def test_epochs_include_the_rows_that_a_branch_continues(
    rows: int, leave: Leave, tiny_shards: Path
) -> None:
    epochs = {"training": {"epochs": 1.5}}
    trunk = open_data(config_with(str(tiny_shards), **epochs), 0, 1)
    branch = open_data(config_with(str(tiny_shards), rows, **epochs), 0, 1, leave())
    epoch_rows = trunk.streams[0].order.rows_per_epoch

    num_rows = 5 * 8 + (branch.total_steps - 5) * rows
    assert abs(num_rows - 1.5 * epoch_rows) < rows
    assert branch.mixed.uses[0].epochs == pytest.approx(1.5, abs=rows / epoch_rows)


def test_without_the_data_epochs_are_of_the_branchs_own(leave: Leave, tiny_shards: Path) -> None:
    epochs = {"training": {"epochs": 1.5}}
    point = leave(rows=0, kept=("weights", "optimizer", "schedule"))
    trunk = open_data(config_with(str(tiny_shards), **epochs), 0, 1)

    assert open_data(config_with(str(tiny_shards), **epochs), 0, 1, point).total_steps == (
        5 + trunk.total_steps
    )


@pytest.mark.parametrize("training", [{"steps": 5}, {"steps": 1}, {"epochs": 0.1}])
def test_a_branch_without_steps_of_its_own_is_refused(
    training: dict[str, float], leave: Leave, tiny_shards: Path
) -> None:
    with pytest.raises(ConfigError, match=r"ends at step \d, .*has done 5 .*keep=\[weights, opt"):
        open_data(config_with(str(tiny_shards), training=training), 0, 1, leave())


def test_the_rows_of_all_ranks_are_those_of_one(leave: Leave, tiny_shards: Path) -> None:
    config = config_with(str(tiny_shards), 16)
    whole = open_data(config, 0, 1, leave())
    halves = [
        open_data(
            config.model_copy(
                update={"batch": config.batch.model_copy(update={"micro_batch_rows": 4})}
            ),
            rank,
            2,
            leave(),
        )
        for rank in (0, 1)
    ]

    for step in (5, 6):
        parts = [half.training.places(step + half.read_steps) for half in halves]
        expected = whole.training.places(step + whole.read_steps)
        assert (np.concatenate(parts, axis=1) == expected).all()
