"""One model of both directions, as each command and the Python API use it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import megaback
from data_pipeline.errors import DirectionMismatchError
from data_pipeline.text.codec import BEGIN_PIECE, END_PIECE, Direction, TextCodec, Unit
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.scoring.choices import ChoiceEncoder
from megaback.weights.model_folder import load_model_folder, read_description
from tests.helpers.models import CONTEXT_TOKENS, random_model, write_model
from tools.convert import main as convert
from tools.infill import main as infill
from tools.sample import main as sample
from tools.score import main as score
from tools.serving.models import load_meeting, load_models

CPU = torch.device("cpu")
ENDING, BEGINNING = "the last map.", "the old captain"
PAIR = {"question": "the old captain", "answer": "the last map."}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]) -> Path:
    both = TextCodec(codec().model_bytes, Direction.BACKWARD, Unit.TOKEN, both=True)
    return write_model(tmp_path_factory.mktemp("models") / "both", random_model(), both)


def run(command: Any, *arguments: object, **given: Any) -> Result:
    return CliRunner().invoke(command, list(map(str, arguments)), **given)


def test_a_text_says_the_direction_and_the_other_one_is_refused(folder: Path) -> None:
    written = run(sample, folder, "--ending", ENDING, "--max-new-tokens", 5).stdout
    assert written.endswith(f"{ENDING}\n")
    written = run(sample, folder, "--beginning", BEGINNING, "--max-new-tokens", 5).stdout
    assert written.startswith(BEGINNING)
    refused = run(sample, folder, "--ending", ENDING, "--direction", "forward")
    assert "--ending is continued backward; omit --direction" in refused.stderr


def test_a_writer_writes_both_ways_and_streams_in_the_asked_one(folder: Path) -> None:
    writer = megaback.load(folder)
    before = writer.complete_backwards(ENDING, max_new_tokens=5)
    after = writer.complete_forwards(BEGINNING, max_new_tokens=5)

    assert before.endswith(ENDING)
    assert after.startswith(BEGINNING)
    forward = megaback.load(folder, direction="forward")
    assert forward.complete_forwards(BEGINNING, max_new_tokens=5) == after
    assert forward.complete_many([BEGINNING])[0].startswith(BEGINNING)


def test_a_sample_past_its_context_keeps_the_marker(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = megaback.load(folder, direction="forward")
    read: list[list[int]] = []
    read_steps = writer.decoder.read_steps

    def noting(ids: list[int]) -> Any:
        read.append(list(ids))
        return read_steps(ids)

    monkeypatch.setattr(writer.decoder, "read_steps", noting)
    writer.complete_forwards(BEGINNING, max_new_tokens=2 * CONTEXT_TOKENS, min_new_tokens=100)

    assert len(read) > 2
    assert {ids[0] for ids in read} == {writer.codec.begin_id}


@pytest.mark.parametrize(
    ("direction", "marker"), [("backward", BEGIN_PIECE), ("forward", END_PIECE)]
)
def test_scores_are_those_behind_the_marker_of_the_direction(
    folder: Path, direction: str, marker: str
) -> None:
    given = ("--form", "plain", "--in", "-", "--out", "-", "--no-prior")
    result = run(score, folder, *given, "--direction", direction, input=json.dumps(PAIR))
    found = json.loads(result.stdout)["score"]["log_probability"]

    model, _, codec = load_model_folder(folder, CPU, direction=Direction(direction))
    assert codec.piece(codec.begin_id) == marker
    texts = PAIR["question"], PAIR["answer"]
    first, second = texts if direction == "forward" else texts[::-1]
    ids = [codec.begin_id, *codec.encode(first).tolist()]
    expected = log_probabilities(model, [Continuation(ids, codec.encode(second).tolist())])
    assert found == pytest.approx(float(expected[0]), abs=1e-4)


def test_one_model_gives_both_halves_of_an_infill(folder: Path, tmp_path: Path) -> None:
    asked = ("--beginning", BEGINNING, "--ending", ENDING, "--max-new-tokens", 6)
    result = run(infill, "--backward", folder, *asked)
    assert result.stdout.startswith(BEGINNING)
    assert result.stdout.endswith(f"{ENDING}\n")

    _, description, codec = load_model_folder(folder, CPU)
    single = TextCodec(codec.model_bytes, Direction.BACKWARD, Unit.TOKEN)
    backward = write_model(tmp_path / "backward", random_model(), single)
    assert description.text_format.both
    refused = run(infill, "--backward", backward, *asked)
    assert "writes backward only, not forward; name a model of each direction" in refused.stderr


def test_a_server_has_it_as_two_models_with_one_set_of_weights(folder: Path) -> None:
    models = load_models(folder, None, CPU, torch.float32, num_slots=2)

    assert {name: one.codec.format.direction.value for name, one in models.items()} == {
        "both": "backward",
        "both-forward": "forward",
    }
    first, second = models.values()
    assert first.decoder is second.decoder
    assert load_meeting(models) is not None


@pytest.mark.parametrize("direction", list(Direction))
def test_an_export_for_transformers_has_the_markers_of_its_direction(
    folder: Path, tmp_path: Path, direction: Direction
) -> None:
    out = tmp_path / "hf"
    result = run(convert, folder, "--to", "hf", "--out", out, "--direction", direction.value)
    assert result.exit_code == 0, result.stderr

    codec = load_model_folder(folder, CPU, direction=direction)[2]
    generation = json.loads((out / "generation_config.json").read_text())
    tokenizer = json.loads((out / "tokenizer_config.json").read_text())
    assert generation["eos_token_id"] == codec.end_id
    assert tokenizer["bos_token"] == codec.piece(codec.begin_id)
    assert tokenizer["direction"] == direction.value
    assert read_description(out).text_format.both
    card = (out / "README.md").read_text()
    assert "--direction" in card


def test_the_direction_of_a_full_export_is_not_chosen(folder: Path, tmp_path: Path) -> None:
    result = run(convert, folder, "--out", tmp_path / "full", "--direction", "forward")

    assert "full has every direction" in result.stderr


def test_a_model_of_one_direction_is_not_used_in_the_other(folder: Path, tmp_path: Path) -> None:
    codec = load_model_folder(folder, CPU)[2]
    single = TextCodec(codec.model_bytes, Direction.BACKWARD, Unit.TOKEN)
    backward = write_model(tmp_path / "backward", random_model(), single)

    for load in (megaback.load, megaback.load_scorer, megaback.load_chat):
        with pytest.raises(DirectionMismatchError, match="writes backward only, not forward"):
            load(backward, direction="forward")


def test_windows_of_a_long_document_each_begin_with_the_marker(folder: Path) -> None:
    codec = load_model_folder(folder, CPU, direction=Direction.FORWARD)[2]
    text = "the old captain sold the last map. " * 20

    windows = ChoiceEncoder(codec, CONTEXT_TOKENS).document_windows(text)

    assert len(windows) > 2
    assert {window.given[0] for window in windows} == {codec.begin_id}
    scored = [one for window in windows for one in window.written]
    assert scored == codec.encode(text).tolist()
    assert max(len(one.given) + len(one.written) - 1 for one in windows) <= CONTEXT_TOKENS
