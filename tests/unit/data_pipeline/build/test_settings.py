"""Build settings: document filters, and errors that name the option."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build.settings import BuildSettings
from data_pipeline.errors import BadRecordError, ConfigError, OutputExistsError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.documents import Document
from data_pipeline.sources.weighted import WeightedSource, weighted_sources
from tests.helpers.builds import Codecs, build_here, documents_of, make_settings, write_records

RECORDS: list[dict[str, object]] = [
    {"text": "sehr kurz", "language": "de", "language_score": 0.9},
    {"text": "short", "language": "en", "language_score": 0.95},
    {"text": "of middling length", "language": "en", "language_score": 0.4},
    {"text": "a text that nobody scored", "language": "en", "language_score": None},
    {"text": "a text whose language nobody knows", "language": None, "language_score": 0.99},
    {"text": "the longest one of all the texts that are here", "language": "en"}
    | {"language_score": 0.65},
    {"text": "", "language": "en", "language_score": 1.0},
]

CASES: dict[str, tuple[dict[str, object], list[int], dict[str, int]]] = {
    "no filter": ({}, [0, 1, 2, 3, 4, 5], {"empty": 1}),
    "a language": ({"languages": ("en",)}, [1, 2, 3, 5], {"empty": 1, "language": 2}),
    "two languages": ({"languages": ("en", "de")}, [0, 1, 2, 3, 5], {"empty": 1, "language": 1}),
    "a score": ({"min_language_score": 0.65}, [0, 1, 4, 5], {"empty": 1, "language_score": 2}),
    "minimum length": ({"min_characters": 18}, [2, 3, 4, 5], {"empty": 1, "length": 2}),
    "maximum length": ({"max_characters": 9}, [0, 1], {"empty": 1, "length": 4}),
    "all of them": (
        {"languages": ("en",), "min_language_score": 0.6, "max_characters": 40},
        [1],
        {"empty": 1, "language": 2, "language_score": 2, "length": 1},
    ),
}


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
@pytest.mark.parametrize("name", CASES)
def test_a_filter_excludes_and_counts_documents(
    name: str, suffix: str, codec: Codecs, tmp_path: Path
) -> None:
    changed, kept, excluded = CASES[name]
    source = write_records(tmp_path / f"records.{suffix}", RECORDS)
    settings = make_settings(source, codec(), val_fraction=0.0, **changed)
    manifest = build_here(settings, codec(), tmp_path / "shards")
    assert documents_of(tmp_path / "shards")["train"] == [RECORDS[row]["text"] for row in kept]
    assert manifest.excluded == excluded


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_columns_may_have_other_names(suffix: str, codec: Codecs, tmp_path: Path) -> None:
    names = {"text": "body", "language": "lang", "language_score": "score"}
    records = [{names[name]: value for name, value in record.items()} for record in RECORDS]
    source = write_records(tmp_path / f"records.{suffix}", records)
    settings = make_settings(
        source,
        codec(),
        val_fraction=0.0,
        text_column="body",
        language_column="lang",
        language_score_column="score",
        languages=("en",),
        min_language_score=0.65,
    )
    build_here(settings, codec(), tmp_path / "shards")
    assert documents_of(tmp_path / "shards")["train"] == [RECORDS[row]["text"] for row in (1, 5)]


def test_columns_that_no_filter_needs_are_not_read(codec: Codecs) -> None:
    columns = make_settings("x", codec()).columns
    assert (columns.language, columns.language_score) == (None, None)


@given(
    minimum=st.integers(1, 30),
    maximum=st.none() | st.integers(1, 30),
    text=st.text(min_size=1, max_size=40),
)
def test_lengths_are_counted_in_characters(minimum: int, maximum: int | None, text: str) -> None:
    if maximum is not None and maximum < minimum:
        return
    settings = BuildSettings((), "", min_characters=minimum, max_characters=maximum)
    fits = minimum <= len(text) <= (len(text) if maximum is None else maximum)
    assert (settings.exclusion_reason(Document(text, "here")) is None) == fits


@pytest.mark.parametrize("score", [None, float("nan"), 0.4999])
def test_a_missing_or_low_score_excludes_a_document(score: float | None) -> None:
    settings = BuildSettings((), "", min_language_score=0.5)
    document = Document("text", "here", language_score=score)
    assert settings.exclusion_reason(document) == "language_score"


@pytest.mark.parametrize(
    "changed",
    [
        {"deduplicate": True},
        {"limit_documents": 4},
        {"limit_tokens": 4},
        {"min_characters": 2},
        {"max_characters": 900},
        {"languages": ("en",)},
        {"text_column": "body"},
        {"shard_tokens": 1600},
        {"compression_level": 4},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_folder_of_other_settings_is_refused_naming_the_setting(
    changed: dict[str, object], codec: Codecs
) -> None:
    mine = make_settings("source", codec())
    with pytest.raises(OutputExistsError, match=next(iter(changed))):
        mine.require_same(make_settings("source", codec(), **changed), Path("out"))


def test_a_source_by_a_relative_path_is_the_same_source(
    codec: Codecs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mine = make_settings(tmp_path / "source", codec())
    mine.require_same(make_settings("source", codec()), Path("out"))


def test_a_source_of_another_weight_is_refused(codec: Codecs) -> None:
    mine = make_settings("source", codec())
    other = make_settings("source", codec(), sources=(WeightedSource("source", 2.0),))
    with pytest.raises(OutputExistsError, match="2 x source"):
        mine.require_same(other, Path("out"))


@pytest.mark.parametrize(
    ("changed", "option"),
    [
        ({"sources": (WeightedSource("s", 0.0),)}, "`weight`"),
        ({"sources": (WeightedSource("s", float("nan")),)}, "`weight`"),
        ({"sources": (WeightedSource("s", 1e9),)}, "`weight`"),
        ({"min_characters": 9, "max_characters": 8}, "`max_characters`"),
    ],
    ids=str,
)
def test_invalid_settings_are_refused_by_name(
    changed: dict[str, object], option: str, codec: Codecs
) -> None:
    with pytest.raises(ConfigError, match=option):
        make_settings("source", codec(), **changed)


def test_sources_and_weights_must_pair() -> None:
    with pytest.raises(ConfigError, match="2 `source` and 1 `weight`"):
        weighted_sources(("a", "b"), (1.0,))


@pytest.fixture
def bad_source(tmp_path: Path) -> Path:
    path = write_records(tmp_path / "bad.jsonl", [{"text": "good"}] * 3)
    path.write_text(path.read_text() + '{"text": "cut\n{"text": "good again"}\n{"body": "x"}\n')
    return path


def test_a_bad_record_stops_a_build_naming_file_and_line(
    bad_source: Path, codec: Codecs, tmp_path: Path
) -> None:
    with pytest.raises(BadRecordError, match=r"bad\.jsonl:4:"):
        build_here(make_settings(bad_source, codec()), codec(), tmp_path / "shards")


def test_bad_records_may_be_skipped_and_counted(
    bad_source: Path, codec: Codecs, tmp_path: Path
) -> None:
    settings = make_settings(bad_source, codec(), on_bad_record="skip", val_fraction=0.0)
    build_here(settings, codec(), tmp_path / "shards")
    assert Manifest.load(tmp_path / "shards").excluded == {"bad_record": 2}
    assert documents_of(tmp_path / "shards")["train"] == ["good"] * 3 + ["good again"]
