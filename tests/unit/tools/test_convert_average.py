"""`megaback convert --average`: formats, cards, val losses and wrong input."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from data_pipeline.errors import ConfigError, ShardsMissingError
from data_pipeline.text.codec import TextCodec
from megaback.weights.average import average_of
from megaback.weights.model_folder import read_description
from tests.helpers.exports import write_checkpoint
from tests.helpers.stored import read_weights
from tools.artifacts import inspect
from tools.convert import main as convert_command
from tools.evaluate import main as evaluate_command

Codecs = Callable[..., TextCodec]


def converted(*words: object) -> Result:
    return CliRunner().invoke(convert_command, [str(word) for word in words])


@pytest.fixture
def run(tmp_path: Path, codec: Codecs, tiny_shards: Path) -> Path:
    """A run of two checkpoints, whose config names its data."""
    for step in (10, 20):
        write_checkpoint(tmp_path / "run", codec(), step=step, seed=step, shards=tiny_shards)
    return tmp_path / "run"


def test_an_average_has_the_val_losses_of_itself_and_of_the_last_one(
    run: Path, tmp_path: Path, tiny_shards: Path
) -> None:
    result = converted(run, "--average-last", 2, "--out", tmp_path / "mean")

    assert result.exit_code == 0, result.output
    description = read_description(tmp_path / "mean")
    average = description.average
    assert average is not None
    assert f"val loss    {description.val_loss:.4f} nats/token" in result.output
    assert f"{average.last_val_loss:.4f} nats/token" in result.output
    assert inspect(tmp_path / "mean", verify=True).facts["average_of"] == [
        f"{run}/checkpoints/step-000000{step}" for step in (10, 20)
    ]
    words = ["--suite", "bits-per-byte", "--shards", tiny_shards, "--out", tmp_path / "eval.json"]
    suite = CliRunner().invoke(evaluate_command, [str(tmp_path / "mean"), *map(str, words)])
    assert suite.exit_code == 0, suite.output
    measured = json.loads((tmp_path / "eval.json").read_text())["suites"]["bits-per-byte"]
    bits = measured["metrics"]["bits/byte"]["value"]
    assert f"({bits:.4f} bits/byte) of the average" in result.output


@pytest.mark.parametrize("kind", ["full", "hf", "gguf"])
def test_every_format_names_all_sources_and_both_losses(
    kind: str, run: Path, tmp_path: Path
) -> None:
    words = (*sorted((run / "checkpoints").glob("step-*")), "--average", "--to", kind)
    assert converted(*words, "--out", tmp_path / "mean").exit_code == 0

    averaged = average_of(sorted((run / "checkpoints").glob("step-*")))
    average = averaged.description.average
    assert average is not None
    where = tmp_path / "mean" / ("config.json" if kind == "full" else "README.md")
    text = where.read_text()
    for source in average.sources:
        assert source.path in text
        assert source.sha256 is not None
        assert source.sha256 in text
    if kind != "full":
        assert "of the last one alone" in text
    if kind != "gguf":
        weights = read_weights(tmp_path / "mean")
        assert all(torch.equal(weights[name], averaged.read(name)) for name in weights)
        kept = read_description(tmp_path / "mean").average
        assert kept is not None
        assert kept.sources == average.sources


def test_val_losses_are_skipped_on_request_or_reported_as_not_measured(
    run: Path, tmp_path: Path, codec: Codecs
) -> None:
    for step in (10, 20):  # their config names data that is not there
        write_checkpoint(tmp_path / "moved", codec(), step=step, seed=step)
    quiet = converted(run, "--average-last", 2, "--no-val-loss", "--out", tmp_path / "a")
    moved = converted(tmp_path / "moved", "--average-last", 2, "--out", tmp_path / "b")
    models = converted(tmp_path / "a", tmp_path / "b", "--average", "--out", tmp_path / "c")
    asked = converted(
        *(tmp_path / "moved", "--average-last", 2, "--out", tmp_path / "d"),
        *("--shards", tmp_path / "none"),
    )

    assert "val loss" not in quiet.output
    assert "val loss    not measured: there is no data set at unused" in moved.output
    assert models.exit_code == ConfigError.exit_code  # the same weights
    assert asked.exit_code == ShardsMissingError.exit_code
    assert read_description(tmp_path / "b").val_loss is None
    assert not (tmp_path / "d").exists()


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--average", "--average-last", "2"], "exclude each other"),
        (["OTHER"], "add --average"),
        (["OTHER", "--average-last", "2"], "add --average"),
        (["--shards", "x"], "--shards and --device are for"),
        (["--average-last", "1"], "2"),
    ],
)
def test_options_that_do_not_fit_are_refused(words: list[str], named: str, run: Path) -> None:
    result = converted(run, *words, "--out", run / "model")

    assert result.exit_code == 2
    assert named in result.output
    assert not (run / "model").exists()
