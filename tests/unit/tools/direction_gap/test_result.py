"""Result file of `megaback arrow`: round trip, and errors for other files."""

import json
import math
from pathlib import Path

import pytest

from data_pipeline.errors import CheckpointCorruptError
from megaback.scoring.paired_difference import PairedDifference
from tests.helpers.run_config import run_config
from tools.direction_gap.result import JSON_NAME, Arrow, is_summary, read_summary


def difference(forward: float, backward: float) -> PairedDifference:
    return PairedDifference(
        first=forward,
        second=backward,
        nats=backward - forward,
        nats_error=0.01,
        percent=100 * (backward / forward - 1),
        percent_error=0.2,
        num_targets=5000,
        num_documents=40,
    )


def result(seeds: dict[int, PairedDifference]) -> Arrow:
    return Arrow(
        steps=25,
        tokens=6400,
        whole=difference(4.0, 4.1),
        seeds=seeds,
        by_context={"1": difference(6.0, 6.2)},
        by_part={"0-10%": difference(5.0, 5.1)},
        bits_per_byte={"forward": 1.5, "backward": 1.6},
    )


def test_a_summary_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    arrow = result({1: difference(4.0, 4.1), 2: difference(4.0, 4.3)})
    path = tmp_path / JSON_NAME
    path.write_text(json.dumps(arrow.to_json(run_config(tmp_path / "run"))))

    summary = read_summary(path)

    assert is_summary(path)
    assert (summary["forward"], summary["backward"], summary["seeds"]) == (4.0, 4.1, 2)
    assert summary["gap"] == pytest.approx(0.1)
    # The standard error of a mean of two values is half their difference.
    assert summary["seeds_error"] == pytest.approx(0.1)


def test_one_seed_has_no_error_over_seeds() -> None:
    assert result({1: difference(4.0, 4.1)}).seeds_error is None
    same = result({seed: difference(4.0, 4.1) for seed in range(3)}).seeds_error
    assert same is not None
    assert math.isclose(same, 0, abs_tol=1e-12)


@pytest.mark.parametrize(
    "change", [{"version": 99}, {"format": "other"}, {"whole": None}, {"seeds": 3}]
)
def test_another_file_or_version_is_refused(change: dict[str, object], tmp_path: Path) -> None:
    fields = result({1: difference(4.0, 4.1)}).to_json(run_config(tmp_path / "run"))
    path = tmp_path / JSON_NAME
    path.write_text(json.dumps(fields | change))
    with pytest.raises(CheckpointCorruptError, match="--measure-only`"):
        read_summary(path)
    assert is_summary(path) == ("format" not in change)
