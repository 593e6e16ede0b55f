"""Early stopping: counting of validations, its reason, and the mark of the best checkpoint."""

import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megaback.training.early_stopping import EarlyStopping, mark_best, read_measurements

LOSSES = st.lists(
    st.one_of(st.none(), st.floats(0, 10), st.just(math.nan), st.just(math.inf)), max_size=12
)


def measured(maximum: int | None, losses: list[float | None]) -> EarlyStopping:
    return EarlyStopping(maximum, enumerate(losses))


@given(LOSSES, st.integers(1, 4))
def test_patience_is_exhausted_after_that_many_measurements_without_improvement(
    losses: list[float | None], maximum: int
) -> None:
    best, since = math.inf, 0
    for loss in losses:
        improves = loss is not None and loss < best
        best, since = (loss, 0) if improves and loss is not None else (best, since + 1)
    patience = measured(maximum, losses)
    assert patience.is_exhausted == (since >= maximum)
    if patience.best_step is None:
        assert best == math.inf
    else:
        numbers = [loss for loss in losses if loss is not None and not math.isnan(loss)]
        assert losses[patience.best_step] == best == min(numbers)


@given(LOSSES, st.integers(0, 12))
def test_measurements_before_an_interruption_count(losses: list[float | None], cut: int) -> None:
    resumed = EarlyStopping(2, enumerate(losses[:cut]))
    for step, loss in enumerate(losses[cut:], start=len(losses[:cut])):
        resumed.measured(step, loss)
    whole = measured(2, losses)
    assert (resumed.best_step, resumed.is_exhausted, resumed.reason) == (
        whole.best_step,
        whole.is_exhausted,
        whole.reason,
    )


def test_without_patience_it_never_ends_a_run_and_keeps_no_checkpoint() -> None:
    patience = measured(None, [1.0, *[2.0] * 99])
    assert not patience.is_exhausted
    assert not patience.is_kept(0)
    assert patience.best_step == 0


def test_the_reason_names_the_best_loss_and_its_step() -> None:
    patience = measured(2, [3.0, 1.25, 1.25, 2.0])
    assert patience.reason == (
        "stopped early: val loss did not fall below 1.2500 (step 1) in 2 validations"
    )
    assert measured(1, [math.nan]).reason == (
        "stopped early: no val loss was finite in 1 validation"
    )


def test_measurements_are_read_from_the_metrics_up_to_a_step(tmp_path: Path) -> None:
    lines = [{"step": 0, "val_loss": 3.0}, {"step": 1, "loss": 2.0}, {"step": 1, "val_loss": None}]
    lines.append({"step": 2, "val_loss": 1.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_measurements(tmp_path, 1) == [(0, 3.0), (1, None)]
    assert read_measurements(tmp_path / "nowhere", 1) == []


@pytest.mark.parametrize("step", [None, 7])
def test_the_mark_of_a_missing_checkpoint_is_removed(tmp_path: Path, step: int | None) -> None:
    target = tmp_path / "checkpoints" / "step-00000005"
    target.mkdir(parents=True)
    (target / "meta.json").write_text("{}")
    mark_best(tmp_path, 5)
    assert (tmp_path / "checkpoints" / "best").read_text() == "step-00000005\n"
    mark_best(tmp_path, step)
    assert not (tmp_path / "checkpoints" / "best").exists()
