"""Result of a ladder: file, table, figure, and what a partial one says."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from data_pipeline.common.figures import png_of
from data_pipeline.errors import CheckpointCorruptError
from megaback.scoring.paired_difference import PairedDifference
from tests.helpers.run_config import run_config
from tools.artifacts import inspect
from tools.direction_gap.ladder_figure import ladder_figure
from tools.direction_gap.ladder_result import LADDER_NAME, Ladder, Point, is_ladder, read_ladder
from tools.direction_gap.ladder_table import fit_sentence, ladder_table, missing_sentence


def difference(percent: float) -> PairedDifference:
    return PairedDifference(
        first=4.0,
        second=4.0 * (1 + percent / 100),
        nats=percent / 25,
        nats_error=0.0125,
        percent=percent,
        percent_error=0.33,
        num_targets=5000,
        num_documents=40,
    )


def point(size: str, num_parameters: int, tokens: int, *percents: float) -> Point:
    return Point(
        name=f"{size}-{tokens}",
        size=size,
        num_parameters=num_parameters,
        tokens=tokens,
        max_documents=100,
        whole=difference(sum(percents) / len(percents)),
        seeds={seed: difference(percent) for seed, percent in enumerate(percents)},
        models={seed: f"hash {seed}" for seed in range(len(percents))},
    )


POINTS = [
    point("32x2", 100_000, 150_000, 0.1, 0.3),
    point("64x2", 1_000_000, 150_000, 0.4, 0.6),
    point("32x2", 100_000, 300_000, 0.2, 0.4),
]


def printed(ladder: Ladder) -> str:
    console = Console(width=200, record=True, file=None, quiet=False)
    with console.capture() as found:
        console.print(ladder_table(ladder))
    return found.get()


@pytest.fixture
def written(tmp_path: Path) -> Path:
    path = tmp_path / LADDER_NAME
    fields = Ladder(POINTS, ["64x2-300000"]).to_json(run_config(tmp_path))
    path.write_text(json.dumps(fields))
    return path


def test_points_are_read_back_as_they_were_written(written: Path) -> None:
    assert is_ladder(written)
    assert read_ladder(written)[0] == POINTS
    assert json.loads(written.read_text())["missing"] == ["64x2-300000"]


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"format": "other"},
        {"rungs": 3},
        {"rungs": [{"name": "32x2"}]},
        {"config": 3},
    ],
)
def test_another_file_or_version_is_refused(change: dict[str, Any], written: Path) -> None:
    written.write_text(json.dumps(json.loads(written.read_text()) | change))
    with pytest.raises(CheckpointCorruptError, match="--measure-only`"):
        read_ladder(written)
    assert is_ladder(written) == ("format" not in change)


def test_inspect_identifies_it(written: Path) -> None:
    for path in (written, written.parent):
        found = inspect(path, verify=False)
        assert found.kind == "ladder of arrows of time"
        assert found.facts["64x2-150000"] == "+0.50%"


def test_errors_over_seeds_are_those_of_the_mean() -> None:
    first = POINTS[0]
    assert first.percent_seeds_error == pytest.approx(0.1)
    assert first.nats_seeds_error == pytest.approx(0.004)
    assert point("32x2", 100_000, 150_000, 0.1).percent_seeds_error is None


def test_the_table_has_each_rung_and_the_published_gaps() -> None:
    lines = {" ".join(line.split()) for line in printed(Ladder(POINTS, [])).splitlines()}

    assert {
        "64x2 1,000,000 150,000 2 4.0000 +0.0200 +0.50 0.10 0.33",
        "GPT-2 on neuroscience 355M +1.87",
        "Reversal Blessing 2,000 to 8,000M +2.10 to 2.40",
    } <= lines


def test_the_summary_has_the_fit_with_its_errors() -> None:
    text = fit_sentence(Ladder(POINTS, []))

    assert text.startswith("fit over 6 pairs: +")
    assert "+0.30 +- 0.14 points per tenfold parameters and +0.33 +- 0.47 points" in text
    assert "scatters by 0.14 points" in text


def test_the_summary_of_one_pair_asks_for_more_seeds() -> None:
    text = fit_sentence(Ladder([point("32x2", 100_000, 150_000, 0.1)], []))

    assert "fit over 1 pairs: +0.10% at 100,000 parameters and 150,000 tokens." in text
    assert "--num-seeds 3" in text


def test_missing_rungs_are_named() -> None:
    assert missing_sentence(Ladder(POINTS, [])) == ""
    assert "64x2-300000, 64x2-600000;" in missing_sentence(
        Ladder(POINTS, ["64x2-300000", "64x2-600000"])
    )


def test_the_figure_has_one_line_per_budget_and_the_published_gaps() -> None:
    figure = ladder_figure(Ladder(POINTS, []))
    (axes,) = figure.axes
    legend = axes.get_legend()

    assert legend is not None
    assert {text.get_text() for text in legend.get_texts()} == {
        *("150,000 tokens", "300,000 tokens", "GPT-2 on neuroscience", "Reversal Blessing"),
    }
    fits = [line for line in axes.get_lines() if line.get_linestyle() == "--"]
    low, high = (float(value) for value in fits[0].get_ydata())
    assert math.isclose(high - low, 0.3, abs_tol=1e-6)
    assert png_of(figure).startswith(b"\x89PNG")
