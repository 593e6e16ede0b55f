"""Axes and lines of a sweep's figure."""

from typing import Any

import pytest

from data_pipeline.errors import ConfigError
from tools.sweeps.figure import horizontal_key, sweep_figure
from tools.sweeps.result import Setting, SweepResult

RATE, WIDTH, NAME = "optimizer.learning_rate", "model.width", "optimizer.name"


def result(*settings: dict[str, Any], diverged: int = 0) -> SweepResult:
    """Settings of two seeds; those from `diverged` on have a diverged one."""
    made = [
        Setting(
            values=values,
            losses={0: 3.0 + number, 1: 3.1 + number},
            num_runs=2,
            num_diverged=int(number < diverged),
        )
        for number, values in enumerate(settings)
    ]
    return SweepResult(tuple(settings[0]), [], made)


def test_the_learning_rate_is_horizontal_on_a_logarithmic_scale_with_a_line_per_width() -> None:
    found = result(
        *({WIDTH: width, RATE: rate} for width in (64, 128) for rate in (0.01, 0.001, 0.1))
    )

    (axes,) = sweep_figure(found).axes

    assert axes.get_xlabel() == RATE
    assert axes.get_xscale() == "log"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["0.001", "0.01", "0.1"]
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["width 64", "width 128"]
    (bars, *_) = axes.containers
    assert list(bars.lines[0].get_xdata()) == [0.001, 0.01, 0.1]


def test_another_key_can_be_chosen() -> None:
    found = result(*({WIDTH: width, RATE: rate} for width in (64, 128) for rate in (0.1, 0.2)))

    assert horizontal_key(found, WIDTH) == WIDTH
    with pytest.raises(ConfigError, match=r"over model\.width, optimizer\.learning_rate"):
        horizontal_key(found, "model.widt")


def test_words_have_equal_distances_and_zero_no_logarithm() -> None:
    words = sweep_figure(result({NAME: "muon"}, {NAME: "adamw"})).axes[0]
    zero = sweep_figure(result({"a.b": 0}, {"a.b": 1})).axes[0]

    assert [label.get_text() for label in words.get_xticklabels()] == ["adamw", "muon"]
    assert (words.get_xscale(), zero.get_xscale()) == ("linear", "linear")


def test_diverged_settings_are_crosses() -> None:
    (axes,) = sweep_figure(result({RATE: 0.1}, {RATE: 0.2}, diverged=1)).axes

    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[0.1]]


def test_a_sweep_over_seeds_only_has_one_place() -> None:
    found = SweepResult((), [], [Setting(values={}, losses={0: 1.0}, num_runs=1, num_diverged=0)])

    (axes,) = sweep_figure(found).axes

    assert [label.get_text() for label in axes.get_xticklabels()] == [""]


def test_a_key_that_another_determines_makes_no_line_of_its_own() -> None:
    heads = "model.num_heads"
    zipped = [(64, 1), (128, 2)]
    found = result(
        *({WIDTH: width, heads: num, RATE: rate} for width, num in zipped for rate in (0.1, 0.2))
    )

    labels_by_key = {
        WIDTH: ["learning_rate 0.1", "learning_rate 0.2"],
        RATE: ["width 64", "width 128"],
    }
    for key, labels in labels_by_key.items():
        legend = sweep_figure(found, key).axes[0].get_legend()
        assert legend is not None
        assert [text.get_text() for text in legend.get_texts()] == labels
