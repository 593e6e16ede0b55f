"""Samples of sources: from all parts, by size and weight, complete if they fit."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.sources.documents import Columns
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.tokenizer import text_sample
from data_pipeline.tokenizer.text_sample import sample_texts


def write_files(folder: Path, texts: list[list[str]]) -> str:
    """Write a file per list of texts."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, of_file in enumerate(texts):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in of_file)
        (folder / f"{number:03}.jsonl").write_text(lines)
    return str(folder)


def sample(source: str, max_bytes: int) -> list[str]:
    return list(sample_texts([WeightedSource(source)], max_bytes, Columns()))


@settings(max_examples=25, deadline=None)
@given(
    st.lists(st.lists(st.text(max_size=20), max_size=5), min_size=1, max_size=12).filter(
        lambda files: any(files)
    )
)
def test_a_sample_without_a_cap_is_the_whole_source(
    tmp_path_factory: pytest.TempPathFactory, files: list[list[str]]
) -> None:
    source = write_files(tmp_path_factory.mktemp("source"), files)
    assert sample(source, 1 << 24) == [text for of_file in files for text in of_file]


def test_a_sample_smaller_than_the_source_has_a_part_of_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "_SMALLEST_PART_BYTES", 10)
    files = [[character * 10] * 100 for character in "abcdefgh"]
    texts = sample(write_files(tmp_path / "source", files), 400)
    assert {text[0]: texts.count(text) for text in texts} == dict.fromkeys("abcdefgh", 5)


def test_the_files_of_a_small_sample_are_spread_over_the_source(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "_SMALLEST_PART_BYTES", 10)
    files = [[character * 10] * 100 for character in "abcdefghi"]
    texts = sample(write_files(tmp_path / "source", files), 30)
    assert texts == ["b" * 10, "e" * 10, "h" * 10]


def test_shares_of_files_are_proportional_to_their_sizes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "_SMALLEST_PART_BYTES", 10)
    files = [["a" * 10] * 30, ["b" * 10] * 10]
    text = "".join(sample(write_files(tmp_path / "source", files), 80))
    assert (text.count("a"), text.count("b")) == (60, 20)


def test_shares_of_sources_are_proportional_to_their_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_sample, "_SMALLEST_PART_BYTES", 10)
    first = write_files(tmp_path / "first", [["a" * 10] * 30])
    second = write_files(tmp_path / "second", [["b" * 10] * 30])
    weighted = [WeightedSource(first, 3.0), WeightedSource(second, 1.0)]
    text = "".join(sample_texts(weighted, 80, Columns()))
    assert (text.count("a"), text.count("b")) == (60, 20)


def test_the_last_text_of_a_sample_is_cut_at_a_whole_character(tmp_path: Path) -> None:
    assert sample(write_files(tmp_path / "source", [["ab\u00e9"]]), 3) == ["ab"]
