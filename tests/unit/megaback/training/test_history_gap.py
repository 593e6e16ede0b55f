"""Message of a run that resumes without its earlier metrics."""

import json
from pathlib import Path

import pytest

from megaback.training.history_gap import history_gap
from tests.helpers.run_config import run_config


def write_metrics(run: Path, steps: range, val_steps: tuple[int, ...] = ()) -> None:
    run.mkdir()
    lines = [{"step": step, "loss": 1.0} for step in steps]
    lines += [{"step": step, "val_loss": 1.0} for step in val_steps]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize(
    ("steps", "patience", "expected"),
    [
        (range(1, 21), None, None),
        (range(1, 21), 2, None),
        (range(11, 21), None, None),  # the guard needs no more
        (range(12, 21), None, "the guard compares with 9 of 10 earlier steps"),
        (None, None, "the guard compares with 0 of 10 earlier steps"),
        (None, 2, "0 of 10 earlier steps, and early stopping counts from this step"),
    ],
)
def test_only_missing_metrics_that_are_used_are_reported(
    steps: range | None, patience: int | None, expected: str | None, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    config = run_config(
        run, guard={"window_steps": 10}, validation={"every_steps": 5, "patience": patience}
    )
    if steps is not None:
        write_metrics(run, steps, (15,))

    message = history_gap(config, 20)

    if expected is None:
        assert message is None
    else:
        assert message is not None
        assert f"{run}/metrics.jsonl lacks earlier steps" in message
        assert expected in message


def test_a_run_with_fewer_steps_than_the_window_lacks_nothing(tmp_path: Path) -> None:
    run = tmp_path / "run"
    write_metrics(run, range(1, 4))

    assert history_gap(run_config(run), 3) is None
