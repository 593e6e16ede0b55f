"""Averages of weights: their values, what is refused, and how much is in memory."""

import shutil
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    ConfigError,
    DirectionMismatchError,
    MegabackError,
    RunMismatchError,
)
from data_pipeline.text.codec import Direction, TextCodec
from megaback.model.gpt import ReverseGPT
from megaback.weights import average as average_module
from megaback.weights.average import average_of, last_checkpoints
from megaback.weights.source import WeightSource
from tests.helpers.exports import write_checkpoint
from tests.helpers.models import write_model

Codecs = Callable[..., TextCodec]


@pytest.fixture
def run(tmp_path: Path, codec: Codecs) -> Path:
    """A run with three checkpoints of other weights, each of another number of ranks."""
    for number in (1, 2, 3):
        write_checkpoint(tmp_path / "run", codec(), ranks=number, step=10 * number, seed=number)
    return tmp_path / "run"


def model_of(seed: int, like: ReverseGPT) -> ReverseGPT:
    model = ReverseGPT(like.shape, like.vocab_size)
    model.initialize(seed)
    return model


def test_the_mean_is_that_of_runs_checkpoints_and_models(
    run: Path, tmp_path: Path, codec: Codecs
) -> None:
    _, like = write_checkpoint(tmp_path / "other", codec(), seed=4)
    write_model(tmp_path / "model", model_of(5, like).bfloat16(), codec())
    paths = [run / "checkpoints/step-00000010", run, tmp_path / "other", tmp_path / "model"]

    averaged = average_of(paths)

    weights = [dict(model_of(seed, like).named_parameters()) for seed in (1, 3, 4, 5)]
    weights[-1] = {name: weight.bfloat16() for name, weight in weights[-1].items()}
    for name in averaged.shapes:
        expected = torch.stack([each[name].double() for each in weights]).mean(0).float()
        assert torch.equal(averaged.read(name), expected)
    average = averaged.description.average
    assert average is not None
    assert [source.step for source in average.sources] == [10, 30, 30, 1]
    assert len({source.sha256 for source in average.sources}) == 4
    assert average.sources[1].path == f"{run}/checkpoints/step-00000030"
    assert (averaged.description.step, averaged.description.val_loss) == (1, None)


def test_the_last_checkpoints_are_the_newest_complete_ones(run: Path) -> None:
    (run / "checkpoints/step-00000020/meta.json").unlink()

    assert [path.name[-2:] for path in last_checkpoints(run, 2)] == ["10", "30"]
    assert last_checkpoints(run / "checkpoints", 2) == last_checkpoints(run, 2)
    with pytest.raises(CheckpointMissingError, match=r"has 2 complete checkpoints, not 3"):
        last_checkpoints(run, 3)
    with pytest.raises(CheckpointMissingError, match="is not a run"):
        last_checkpoints(run / "checkpoints/step-00000010", 2)


@pytest.mark.parametrize(
    ("changes", "error", "named"),
    [
        ({"width": 48}, RunMismatchError, "width is 32 and 48"),
        ({"rope_theta": 5e5}, RunMismatchError, "rope_theta is 10000.0 and 500000.0"),
        ({"direction": Direction.FORWARD}, DirectionMismatchError, "direction 'backward'"),
    ],
    ids=["width", "rope_theta", "direction"],
)
def test_models_that_differ_are_refused_by_name(
    changes: dict[str, object],
    error: type[MegabackError],
    named: str,
    run: Path,
    tmp_path: Path,
    codec: Codecs,
) -> None:
    direction = changes.pop("direction", Direction.BACKWARD)
    write_checkpoint(tmp_path / "other", codec(direction), **changes)  # type: ignore[arg-type]

    with pytest.raises(error, match=named) as caught:
        average_of([run, tmp_path / "other"])
    assert f"{run}" in str(caught.value)
    assert f"{tmp_path / 'other'}" in str(caught.value)


def test_one_model_and_one_given_twice_are_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="two or more"):
        average_of([run])
    with pytest.raises(ConfigError, match="the same weights"):
        average_of([run, run / "checkpoints/step-00000010", run / "checkpoints"])


def test_two_runs_with_equal_weights_are_refused_by_name(run: Path, tmp_path: Path) -> None:
    other = shutil.copytree(run / "checkpoints/step-00000030", tmp_path / "step-00000030")
    meta = other / "meta.json"
    meta.write_text(meta.read_text() + "\n")  # of another run

    with pytest.raises(ConfigError, match="the same weights") as caught:
        average_of([run / "checkpoints/step-00000010", run, other])
    assert f"{run}/checkpoints/step-00000030 and {other} have" in str(caught.value)


def test_non_finite_weights_are_named(run: Path, tmp_path: Path, codec: Codecs) -> None:
    _, like = write_checkpoint(tmp_path / "other", codec())
    with torch.no_grad():
        like.model.norm.weight[3] = torch.nan
    write_model(tmp_path / "bad", like, codec())
    averaged = average_of([run, tmp_path / "bad"])

    averaged.read("lm_head.weight")
    with pytest.raises(CheckpointCorruptError, match=r"model\.norm\.weight in .*bad has non-fin"):
        averaged.read("model.norm.weight")


def test_one_tensor_of_a_source_is_in_memory_at_a_time(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watched(path: Path) -> WeightSource:
        source = open_source(path)

        def read(name: str) -> Tensor:
            nonlocal most
            weight = source.read(name)
            alive.append(weakref.ref(weight))
            most = max(most, sum(one() is not None for one in alive))
            return weight

        return WeightSource(source.description, source.tokenizer, source.shapes, read)

    open_source = average_module.open_source
    monkeypatch.setattr(average_module, "open_source", watched)
    averaged = average_of(last_checkpoints(run, 3))

    of_comparison = len(alive)
    for name in averaged.shapes:
        averaged.read(name)
    assert len(alive) - of_comparison == 3 * len(averaged.shapes)
    assert most == 1
