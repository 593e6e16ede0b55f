"""Quality of documents: the losses of `megaback arrow`, for any cut into blocks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from data_pipeline.errors import DirectionMismatchError, TokenizerMismatchError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.text.codec import Direction, TextCodec, Unit
from megaback.inference.device_pool import DevicePool
from megaback.model.gpt import ReverseGPT
from megaback.scoring import quality
from megaback.scoring.directions import Ids, Markers, documents_of, measure, windows_of
from megaback.scoring.quality import QualityScorer
from tests.helpers.models import random_model, write_model

Codecs = Callable[..., TextCodec]

CONTEXT_TOKENS = 24


@pytest.fixture(scope="module")
def models() -> dict[Direction, ReverseGPT]:
    return {direction: random_model(seed) for seed, direction in enumerate(Direction)}


@pytest.fixture(scope="module")
def documents(finished: Path) -> list[Ids]:
    """Documents in text order, shorter and longer than the context."""
    found = list(documents_of(DataSet.open(finished), "train"))[:60]
    lengths = list(map(len, found))
    assert min(lengths) < CONTEXT_TOKENS < 3 * CONTEXT_TOKENS < max(lengths)
    return found


@pytest.fixture
def scorer(models: dict[Direction, ReverseGPT], finished: Path) -> QualityScorer:
    pools = {
        direction: DevicePool(Path(), [torch.device("cpu")], torch.float32, model)
        for direction, model in models.items()
    }
    return QualityScorer(pools, DataSet.open(finished), CONTEXT_TOKENS)


@pytest.mark.parametrize("block_tokens", [1, 100, 1 << 18])
def test_losses_are_those_of_the_direction_gap(
    scorer: QualityScorer,
    models: dict[Direction, ReverseGPT],
    documents: list[Ids],
    codec: Codecs,
    block_tokens: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also when the windows of a document are in several blocks."""
    monkeypatch.setattr(quality, "_BLOCK_TOKENS", block_tokens)
    windows = [
        window
        for number, ids in enumerate(documents)
        for window in windows_of(number, ids, CONTEXT_TOKENS)
    ]
    markers = Markers(codec().begin_id, codec().end_id)

    found = list(scorer.score(enumerate(documents)))

    assert [number for number, _ in found] == list(range(len(documents)))
    for direction, model in models.items():
        expected = measure(
            *(model, direction, windows, CONTEXT_TOKENS, markers, codec().piece_num_bytes()),
            lambda _: None,
        )
        nats = [getattr(one, f"{direction.value}_nats") for _, one in found]
        assert nats == pytest.approx(expected.whole.nats_N, rel=1e-5)
        assert [one.tokens for _, one in found] == expected.whole.targets_N.tolist()


def test_fields_of_a_document(scorer: QualityScorer, documents: list[Ids], codec: Codecs) -> None:
    ((_, found),) = scorer.score([(None, documents[0])])
    fields = found.to_dict()

    text = codec(Direction.FORWARD).render(documents[0])
    assert fields["bytes"] == len(text.encode("utf-8", "surrogatepass"))
    assert fields["tokens"] == len(documents[0]) - 1
    for name in ("forward", "backward"):
        per_token = fields[f"{name}_nats"] / fields["tokens"]
        assert fields[f"{name}_per_token"] == pytest.approx(per_token, abs=1e-5)
    difference = fields["forward_per_token"] - fields["backward_per_token"]
    assert fields["quality"] == pytest.approx(difference, abs=1e-5)


def test_a_document_of_one_token_has_no_loss(scorer: QualityScorer) -> None:
    """Shards of other programs may have one."""
    ((carried, found),) = scorer.score([("it", np.array([5]))])

    assert carried == "it"
    assert (found.tokens, found.forward_nats, found.quality) == (0, 0.0, 0.0)


@pytest.fixture(scope="module")
def folder_of(
    tmp_path_factory: pytest.TempPathFactory, codec: Codecs, models: dict[Direction, ReverseGPT]
) -> Callable[[Direction], Path]:
    place = tmp_path_factory.mktemp("models")
    return lambda direction: write_model(
        place / direction.value, models[direction], codec(direction), CONTEXT_TOKENS
    )


def test_the_models_must_be_of_both_directions(
    folder_of: Callable[[Direction], Path], finished: Path
) -> None:
    backward = folder_of(Direction.BACKWARD)
    with pytest.raises(DirectionMismatchError, match="the forward model writes backward"):
        QualityScorer.load(backward, backward, DataSet.open(finished))


def test_a_model_of_both_directions_is_refused(
    folder_of: Callable[[Direction], Path],
    finished: Path,
    models: dict[Direction, ReverseGPT],
    codec: Codecs,
    tmp_path: Path,
) -> None:
    of_both = TextCodec(codec().model_bytes, Direction.BACKWARD, Unit.TOKEN, both=True)
    both = write_model(tmp_path / "both", models[Direction.BACKWARD], of_both, CONTEXT_TOKENS)
    with pytest.raises(DirectionMismatchError, match="one of these has both; train a pair"):
        QualityScorer.load(both, folder_of(Direction.BACKWARD), DataSet.open(finished))


def test_a_longer_trained_model_is_reported(
    finished: Path,
    models: dict[Direction, ReverseGPT],
    codec: Codecs,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forward, backward = (
        write_model(tmp_path / one.value, models[one], codec(one), CONTEXT_TOKENS)
        for one in (Direction.FORWARD, Direction.BACKWARD)
    )
    QualityScorer.load(forward, backward, DataSet.open(finished), "cpu").close()
    assert not caplog.records

    config = backward / "config.json"
    fields = json.loads(config.read_text())
    fields["step"] = 1234
    config.write_text(json.dumps(fields))
    QualityScorer.load(forward, backward, DataSet.open(finished), "cpu").close()

    assert "and 1,234 steps" in caplog.text


def test_shards_of_another_tokenizer_are_refused(
    folder_of: Callable[[Direction], Path], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = DataSet.open(finished)
    manifest = data_set.manifest
    of_another = replace(manifest.text_format, tokenizer_sha256="0" * 64)
    monkeypatch.setattr(data_set, "manifest", replace(manifest, text_format=of_another))
    forward, backward = folder_of(Direction.FORWARD), folder_of(Direction.BACKWARD)
    with pytest.raises(TokenizerMismatchError, match="the models"):
        QualityScorer.load(forward, backward, data_set)


def test_instruction_examples_are_refused(
    folder_of: Callable[[Direction], Path], finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data_set = DataSet.open(finished)
    monkeypatch.setattr(data_set, "manifest", replace(data_set.manifest, row_tokens=64))
    forward, backward = folder_of(Direction.FORWARD), folder_of(Direction.BACKWARD)
    with pytest.raises(DirectionMismatchError, match="instruction examples"):
        QualityScorer.load(forward, backward, data_set)
