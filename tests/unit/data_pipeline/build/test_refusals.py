"""Refused builds leave an existing folder unchanged, and create none."""

from pathlib import Path

import pytest

from data_pipeline.build.command import build_shards
from data_pipeline.errors import (
    BadRecordError,
    ConfigError,
    DirectionMismatchError,
    MegabackError,
    OutputExistsError,
    SourceEmptyError,
    SourceMissingError,
    TokenizerMismatchError,
)
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer
from tests.helpers.builds import Codecs, hashes, make_settings, write_source

pytestmark = pytest.mark.usefixtures("a_task_a_file")


@pytest.mark.parametrize(
    ("changed", "error", "values"),
    [
        ({"direction": "forward"}, DirectionMismatchError, ["'backward'", "'forward'"]),
        ({"unit": "word"}, DirectionMismatchError, ["'token'", "'word'"]),
        ({"frame_tokens": 512}, OutputExistsError, ["other settings"]),
        ({"val_fraction": 0.2}, OutputExistsError, ["other settings"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_folder_of_other_settings_is_refused_and_not_changed(
    source: Path,
    codec: Codecs,
    copy: Path,
    finished: Path,
    changed: dict[str, object],
    error: type[MegabackError],
    values: list[str],
) -> None:
    chosen = codec(
        Direction(changed.get("direction", "backward")), Unit(changed.get("unit", "token"))
    )
    with pytest.raises(error) as caught:
        build_shards(make_settings(source, chosen, **changed), chosen, copy, workers=1)
    assert [value for value in (str(copy), *values) if value not in str(caught.value)] == []
    assert hashes(copy) == hashes(finished)


def test_a_folder_of_another_tokenizer_is_refused_and_not_changed(
    source: Path, tiny_text_folder: Path, codec: Codecs, copy: Path, finished: Path, tmp_path: Path
) -> None:
    train_tokenizer(str(tiny_text_folder), tmp_path / "other", 400)
    other = TextCodec.load(tmp_path / "other" / "tokenizer.model", Direction.BACKWARD, Unit.TOKEN)
    with pytest.raises(TokenizerMismatchError) as caught:
        build_shards(make_settings(source, other), other, copy, workers=1)
    shas = (codec().format.tokenizer_sha256, other.format.tokenizer_sha256)
    assert [sha for sha in shas if sha[:12] not in str(caught.value)] == []
    assert hashes(copy) == hashes(finished)


def test_a_folder_of_another_source_is_refused_and_not_changed(
    tiny_text_folder: Path, codec: Codecs, copy: Path, finished: Path
) -> None:
    with pytest.raises(OutputExistsError):
        build_shards(make_settings(tiny_text_folder, codec()), codec(), copy, workers=1)
    assert hashes(copy) == hashes(finished)


def test_a_folder_with_other_files_is_refused_and_not_changed(
    source: Path, codec: Codecs, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    with pytest.raises(OutputExistsError, match="mine"):
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    assert {path.name: path.read_text() for path in out.iterdir()} == {"thesis.txt": "precious"}


def test_a_file_in_place_of_the_folder_is_refused_and_not_changed(
    source: Path, codec: Codecs, tmp_path: Path
) -> None:
    out = tmp_path / "mine"
    out.write_text("precious")
    with pytest.raises(OutputExistsError, match="mine"):
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    assert out.read_text() == "precious"


@pytest.mark.usefixtures("in_threads")
def test_a_source_that_changed_after_the_build_is_refused(
    source_texts: list[str], codec: Codecs, tmp_path: Path
) -> None:
    source, out = write_source(tmp_path / "source", source_texts), tmp_path / "shards"
    build_shards(make_settings(source, codec()), codec(), out, workers=1)
    before = hashes(out)
    write_source(source, ["something else", *source_texts[1:]])
    with pytest.raises(OutputExistsError, match="changed"):
        build_shards(make_settings(source, codec()), codec(), out, workers=1)
    assert hashes(out) == before


@pytest.mark.usefixtures("in_threads")
def test_a_finished_folder_without_one_of_its_shards_is_refused(
    source: Path, codec: Codecs, copy: Path
) -> None:
    (copy / "train-00001-00000.zst").unlink()
    with pytest.raises(OutputExistsError, match="is missing or was changed"):
        build_shards(make_settings(source, codec()), codec(), copy, workers=1)


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize(
    ("lines", "error"),
    [
        (['{"text": "good"}', '{"text": "cut'], BadRecordError),
        (['{"text": ""}'], SourceEmptyError),
        ([], SourceEmptyError),
        (None, SourceMissingError),
    ],
    ids=["a bad record", "empty documents alone", "an empty file", "no file"],
)
def test_a_build_that_fails_leaves_no_folder(
    codec: Codecs, tmp_path: Path, lines: list[str] | None, error: type[MegabackError]
) -> None:
    source = tmp_path / "bad.jsonl"
    if lines is not None:
        source.write_text("\n".join(lines))
    with pytest.raises(error):
        build_shards(make_settings(source, codec()), codec(), tmp_path / "shards", workers=1)
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("content", ["", "{", "[]", '{"source": "x", "color": "red"}'])
def test_an_unreadable_plan_is_an_error_that_names_the_folder(
    source: Path, codec: Codecs, copy: Path, content: str
) -> None:
    (copy / "plan.json").write_text(content)
    with pytest.raises(MegabackError, match=str(copy)):
        build_shards(make_settings(source, codec()), codec(), copy, workers=1)


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"frame_tokens": 1000}, "`frame_tokens`"),
        ({"frame_tokens": 32}, "`frame_tokens`"),
        ({"frame_tokens": 1 << 25}, "`frame_tokens`"),
        ({"val_fraction": 1.0}, "`val_fraction`"),
        ({"val_fraction": -0.1}, "`val_fraction`"),
        ({"val_fraction": float("nan")}, "`val_fraction`"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_by_name(
    source: Path, codec: Codecs, tmp_path: Path, changed: dict[str, object], option: str
) -> None:
    with pytest.raises(ConfigError, match=option):
        build_shards(
            make_settings(source, codec(), **changed), codec(), tmp_path / "shards", workers=1
        )
