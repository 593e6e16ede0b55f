"""Training a tokenizer: the model is reproducible and complete, and failures leave nothing."""

import hashlib
import json
import random
from pathlib import Path

import pytest
import sentencepiece
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import OutputExistsError, SourceEmptyError, TokenizerError
from data_pipeline.text.codec import (
    BEGIN_PIECE,
    CHAT_PIECES,
    END_PIECE,
    Direction,
    TextCodec,
    Unit,
)
from data_pipeline.tokenizer import train_tokenizer as tokenizer
from data_pipeline.tokenizer.train_tokenizer import main, train_tokenizer

NUM_PIECES = 400


@pytest.fixture
def source(tmp_path: Path) -> str:
    generator = random.Random(1)
    words = ["".join(generator.choices("abcdefgh", k=generator.randint(2, 8))) for _ in range(500)]
    folder = tmp_path / "source"
    folder.mkdir()
    for name in ("a", "b"):
        lines = [
            json.dumps({"text": " ".join(generator.choices(words, k=30)) + "\n\n42\tkm"})
            for _ in range(100)
        ]
        (folder / f"{name}.jsonl").write_text("\n".join(lines))
    return str(folder)


def load(out_dir: Path) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_file=str(out_dir / "tokenizer.model"))


def test_two_trainings_give_identical_files(source: str, tmp_path: Path) -> None:
    for name in ("one", "two"):
        train_tokenizer(source, tmp_path / name, NUM_PIECES)
    one, two = (
        {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        for name in ("one", "two")
    )
    assert one == two
    assert set(one) == {"tokenizer.model", "tokenizer_report.json"}


def test_a_text_without_spaces_gives_a_tokenizer_that_can_spell_one(tmp_path: Path) -> None:
    source = tmp_path / "a.jsonl"
    products = [(m, n) for m in range(10, 30) for n in range(10, 30)]
    lines = [json.dumps({"text": f"{m}*{n}={m * n}"}) + "\n" for m, n in products]
    source.write_text("".join(lines))

    # Bytes, the unknown piece, markers, a space and the characters of the text: none is left.
    train_tokenizer(str(source), tmp_path / "out", 256 + 3 + len(CHAT_PIECES) + 1 + 12)

    path = tmp_path / "out" / "tokenizer.model"
    codec = TextCodec.load(path, Direction.FORWARD, Unit.TOKEN)
    assert [codec.piece(i) for i in codec.encode("12*34=408 ")] == [*"12*34=408", "\u2581"]


def test_the_number_of_threads_does_not_change_the_pieces(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces = []
    for num_threads in (1, 4):
        monkeypatch.setattr(tokenizer, "_NUM_THREADS", num_threads)
        train_tokenizer(source, tmp_path, NUM_PIECES, overwrite=True)
        processor = load(tmp_path)
        pieces.append([processor.id_to_piece(index) for index in range(NUM_PIECES)])
    assert pieces[0] == pieces[1]


def test_the_markers_are_control_pieces_in_a_fixed_order(source: str, tmp_path: Path) -> None:
    train_tokenizer(source, tmp_path, NUM_PIECES)
    processor = load(tmp_path)
    pieces = (BEGIN_PIECE, END_PIECE, *CHAT_PIECES)
    assert [processor.id_to_piece(index) for index in range(1, 10)] == list(pieces)
    assert all(processor.is_control(index) for index in range(1, 10))


def test_the_vocabulary_has_exactly_the_requested_size(source: str, tmp_path: Path) -> None:
    train_tokenizer(source, tmp_path, NUM_PIECES)
    assert load(tmp_path).vocab_size() == NUM_PIECES


def test_the_report_names_the_model_by_its_hash(source: str, tmp_path: Path) -> None:
    report = train_tokenizer(source, tmp_path, NUM_PIECES)
    model = (tmp_path / "tokenizer.model").read_bytes()
    assert report.model_sha256 == hashlib.sha256(model).hexdigest()


def test_the_report_counts_the_whole_source(source: str, tmp_path: Path) -> None:
    report = train_tokenizer(source, tmp_path, NUM_PIECES)
    texts = [
        json.loads(line)["text"]
        for path in Path(source).iterdir()
        for line in path.read_text().splitlines()
    ]
    assert (report.documents, report.text_bytes) == (200, sum(map(len, texts)))


def test_a_document_of_a_megabyte_is_not_dropped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("wordwise " * 120_000)
    train_tokenizer(str(tmp_path / "a.txt"), tmp_path, 281)
    assert load(tmp_path).encode("wordwise", out_type=str) == ["word", "wise"]


@given(st.text(st.characters(exclude_categories=()), max_size=50))
def test_the_trainer_is_given_every_character_that_it_can_learn(text: str) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "_SENTENCE_CHARACTERS", 3)
        sentences = list(tokenizer._sentences(text))
    unlearnable = ("\u2581", "\u2585")
    assert "".join(sentences) == "".join(
        character
        for character in text
        if character not in unlearnable and not "\ud800" <= character <= "\udfff"
    )


def test_a_document_with_characters_that_cannot_be_learned_still_counts(tmp_path: Path) -> None:
    line = json.dumps({"text": "rarest \ud800 \u2585 rarest \u2581 rarest"})
    (tmp_path / "a.jsonl").write_text(f"{line}\n" * 50)
    train_tokenizer(str(tmp_path / "a.jsonl"), tmp_path, 277)
    assert load(tmp_path).encode("rarest", out_type=str) == ["rarest"]


@pytest.mark.parametrize("num_pieces", [1, 2, 100, 100_000])
def test_the_vocabulary_size_that_an_error_advises_works(
    source: str, tmp_path: Path, num_pieces: int
) -> None:
    with pytest.raises(TokenizerError) as caught:
        train_tokenizer(source, tmp_path / "out", num_pieces)
    advised = int(str(caught.value).partition("; use ")[2].split()[0])
    assert train_tokenizer(source, tmp_path / "out", advised).vocab_size == advised


def test_more_pieces_than_a_tokenizer_may_have_are_refused(source: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError, match="use 2097152 or less"):
        train_tokenizer(source, tmp_path / "out", 2**32 - 1)


@pytest.mark.parametrize("text", ["", "\u2585"])
def test_a_source_without_text_to_learn_is_empty(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    with pytest.raises(SourceEmptyError):
        train_tokenizer(str(tmp_path / "a.jsonl"), tmp_path / "out")


def test_an_error_leaves_no_folder(source: str, tmp_path: Path) -> None:
    with pytest.raises(TokenizerError):
        train_tokenizer(source, tmp_path / "out", 100)
    assert not (tmp_path / "out").exists()


def test_an_existing_tokenizer_is_not_overwritten_by_default(source: str, tmp_path: Path) -> None:
    train_tokenizer(source, tmp_path, NUM_PIECES)
    before = (tmp_path / "tokenizer.model").read_bytes()
    with pytest.raises(OutputExistsError, match="`overwrite`"):
        train_tokenizer(source, tmp_path, NUM_PIECES - 1)
    assert (tmp_path / "tokenizer.model").read_bytes() == before
    train_tokenizer(source, tmp_path, NUM_PIECES - 1, overwrite=True)
    assert (tmp_path / "tokenizer.model").read_bytes() != before


@pytest.mark.parametrize("name", ["tokenizer.model", "tokenizer_report.json"])
def test_a_file_that_no_training_wrote_is_never_overwritten(
    name: str, source: str, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("precious")
    with pytest.raises(OutputExistsError, match="did not write"):
        train_tokenizer(source, tmp_path, NUM_PIECES, overwrite=True)
    assert [path.read_text() for path in tmp_path.glob("tokenizer*")] == ["precious"]


def test_a_disk_that_fails_leaves_the_old_tokenizer_and_nothing_else(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_: int) -> None:
        raise OSError(28, "No space left on device")

    train_tokenizer(source, tmp_path / "out", NUM_PIECES)
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError, match="No space left"):
        train_tokenizer(source, tmp_path / "out", NUM_PIECES, overwrite=True)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before


def test_the_command_prints_the_next_command(source: str, tmp_path: Path) -> None:
    result = CliRunner().invoke(
        main, ["--source", source, "--out", str(tmp_path / "out"), "--vocab-size", str(NUM_PIECES)]
    )
    assert result.stdout.splitlines()[-1].endswith(
        f"megaback shards build --source {source} "
        f"--tokenizer {tmp_path / 'out' / 'tokenizer.model'} --out {tmp_path / 'shards'}"
    )


def test_training_prints_nothing(
    source: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    train_tokenizer(source, tmp_path / "out", NUM_PIECES)
    assert capfd.readouterr() == ("", "")


def test_the_command_reports_an_error_with_its_exit_code(tmp_path: Path) -> None:
    result = CliRunner().invoke(main, ["--source", str(tmp_path / "no"), "--out", str(tmp_path)])
    assert (result.exit_code, "error:" in result.stderr) == (20, True)
