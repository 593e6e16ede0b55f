"""Curves of runs from metrics.jsonl: values, smoothing, thinning, and names."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers.runs import ROW_TOKENS, add_directions, add_suites, finished_steps, suite_metric
from tools.run_views.curves import Curve, differences, names_of, read_curves
from tools.run_views.curves_figure import Style, curves_figure

Steps = Callable[..., Path]


@pytest.fixture
def run_of(tmp_path: Path) -> Steps:
    """`run_of(name, steps)`: folder of a finished run with one restart and one skipped step."""
    return lambda name, steps: finished_steps(tmp_path / name, steps)


def test_curves_match_the_metrics(run_of: Steps) -> None:
    run = run_of("a", 20)
    by_step = read_curves(run, "step", "a")
    assert by_step.num_steps == 20
    assert by_step.loss.places.tolist() == [step for step in range(1, 21) if step != 5]
    assert by_step.loss.values[0] == 8.99
    assert by_step.val_loss.places.tolist() == [0, 10, 20]
    assert by_step.context_loss.places.tolist() == [1, 2, 64]
    assert by_step.context_loss.values.tolist() == [8.8, 8.0, 7.0]
    assert by_step.skipped.tolist() == [5]
    assert by_step.restarts.tolist() == [3]
    by_tokens = read_curves(run, "tokens", "a")
    assert by_tokens.val_loss.places.tolist() == [0, 10 * ROW_TOKENS, 20 * ROW_TOKENS]
    by_time = read_curves(run, "time", "a")
    assert by_time.restarts.tolist() == pytest.approx([1.5 / 3600])


def test_directions_of_a_model_of_both_are_curves_and_a_legend(run_of: Steps) -> None:
    run = run_of("a", 20)
    assert read_curves(run, "step", "a").val_loss_by_direction == {}
    add_directions(run, {10: (8.2, 8.1), 20: (8.1, 7.9)})

    found = read_curves(run, "step", "a")

    curves = found.val_loss_by_direction
    assert {name: curve.values.tolist() for name, curve in curves.items()} == {
        "backward": [8.2, 8.1],
        "forward": [8.1, 7.9],
    }
    assert curves["forward"].places.tolist() == [10, 20]
    (legend,) = curves_figure([found], Style("step", 1, is_logarithmic=False)).legends
    assert "val loss, forward" in [text.get_text() for text in legend.get_texts()]


def test_the_legend_is_read_by_rows(run_of: Steps) -> None:
    run = run_of("a", 20)
    names = list("abcde")
    runs = [read_curves(run, "step", name) for name in names]

    (legend,) = curves_figure(runs, Style("step", 1, is_logarithmic=False)).legends

    columns = np.array_split([text.get_text() for text in legend.get_texts()], 4)
    rows = [column[row] for row in (0, 1) for column in columns if row < len(column)]
    assert rows[:5] == names


def test_suites_have_their_intervals_and_chance(run_of: Steps) -> None:
    run = run_of("a", 20)
    single = suite_metric(0.5) | {"low": None, "high": None}
    add_suites(run, {10: {"sciq": {"acc": suite_metric(0.3)}}, 20: {"sciq": {"acc": single}}})

    (curve,) = read_curves(run, "tokens", "a").suites.values()

    assert (curve.metric, curve.rows, curve.chance) == ("acc", 200, 0.25)
    assert curve.places.tolist() == [10 * ROW_TOKENS, 20 * ROW_TOKENS]
    assert curve.values.tolist() == [0.3, 0.5]
    assert curve.low.tolist() == pytest.approx([0.2, math.nan], nan_ok=True)


@given(st.lists(st.floats(-10, 10), max_size=60), st.integers(1, 9))
def test_smoothing_is_the_mean_of_a_window(values: list[float], steps: int) -> None:
    curve = Curve(np.arange(len(values), dtype=float), np.array(values))
    found = curve.smoothed(steps)
    assert found.places.tolist() == curve.places.tolist()
    for stop in range(1, len(values) + 1):
        window = values[max(0, stop - steps) : stop]
        assert found.values[stop - 1] == pytest.approx(math.fsum(window) / len(window), abs=1e-9)


@given(st.integers(0, 9000))
def test_thinning_keeps_a_few_thousand_points_and_the_mean(points: int) -> None:
    curve = Curve(np.arange(points, dtype=float), np.arange(points, dtype=float))
    found = curve.thinned()
    assert len(found.values) <= min(points, 2000)
    assert found.values.tolist() == found.places.tolist()
    if points and points <= 2000:
        assert found is curve


def test_names_are_the_shortest_suffixes_that_differ(tmp_path: Path) -> None:
    assert names_of([tmp_path / "a", tmp_path / "b"]) == ["a", "b"]
    assert names_of([tmp_path / "x" / "a", tmp_path / "y" / "a"]) == ["x/a", "y/a"]
    assert names_of([tmp_path / "a", tmp_path / "a"]) == ["a", "a"]


def test_differences_between_configs_are_found(tmp_path: Path) -> None:
    for name, rate in (("a", 1), ("b", "null")):
        (tmp_path / name).mkdir()
        text = f"run: {name}\nmodel: {{width: 32}}\noptimizer: {{learning_rate: {rate}}}\n"
        (tmp_path / name / "config.yaml").write_text(text)
    found = differences([tmp_path / "a", tmp_path / "b"])
    assert found == [("optimizer.learning_rate", ["1", "null"])]
