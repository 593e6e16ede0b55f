"""Sources: listing, reading and errors."""

import gzip
import json
import os
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import (
    BadRecordError,
    MegabackError,
    SourceEmptyError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.sources import parquet as parquet_source
from data_pipeline.sources.registry import Columns, Document, Slice, list_slices, read_slice

COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
}


def read_all(source: Path | str, text_column: str = "text") -> list[Document]:
    slices = list_slices(str(source), Columns(text=text_column))
    return [
        document for piece in slices for document in read_slice(piece, Columns(text=text_column))
    ]


def texts(source: Path | str, text_column: str = "text") -> list[str]:
    return [document.text for document in read_all(source, text_column)]


def write_jsonl(path: Path, *lines: str) -> Path:
    path.write_bytes("".join(f"{line}\n" for line in lines).encode())
    return path


def write_parquet(path: Path, values: list[str | None], row_group_size: int = 2) -> Path:
    table = pa.table({"id": list(range(len(values))), "text": pa.array(values, pa.string())})
    pq.write_table(table, path, row_group_size=row_group_size)
    return path


@pytest.mark.parametrize("suffix", COMPRESS)
def test_a_text_file_is_one_unchanged_document(tmp_path: Path, suffix: str) -> None:
    text = "one\ufeff\r\ntwo\n\n\u2028 three \x00"
    path = tmp_path / f"a.txt{suffix}"
    path.write_bytes(COMPRESS[suffix](text.encode()))
    assert read_all(path) == [Document(text, path.name)]


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.text(st.characters(exclude_categories=()))),
    suffix=st.sampled_from(list(COMPRESS)),
)
def test_any_text_survives_a_jsonl_file(values: list[str], suffix: str) -> None:
    lines = [json.dumps({"text": value}, ensure_ascii=True) for value in values]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"a.jsonl{suffix}")
        path.write_bytes(COMPRESS[suffix]("\n".join([*lines, '{"text": ""}']).encode()))
        assert texts(path) == [*values, ""]


@settings(max_examples=20, deadline=None)
@given(
    values=st.lists(st.text(max_size=40), min_size=1, max_size=40),
    row_group_size=st.integers(1, 10),
    slice_bytes=st.integers(1, 600),
)
def test_the_slices_of_a_parquet_file_join_to_the_file(
    values: list[str], row_group_size: int, slice_bytes: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_source, "SLICE_BYTES", slice_bytes)
        path = write_parquet(Path(folder, "a.parquet"), list(values), row_group_size)
        assert read_all(path) == [
            Document(value, f"a.parquet row {row}") for row, value in enumerate(values)
        ]


def test_a_large_parquet_file_has_several_slices(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "SLICE_BYTES", 1)
    path = write_parquet(tmp_path / "a.parquet", ["a", "b", "c", "d", "e"])
    slices = list_slices(str(path))
    assert [(piece.start, piece.stop) for piece in slices] == [(0, 1), (1, 2), (2, 3)]


def test_dictionary_encoded_and_large_strings_are_read(tmp_path: Path) -> None:
    for name, column in {
        "a.parquet": pa.array(["x", "y", "x"]).dictionary_encode(),
        "b.parquet": pa.array(["z"], pa.large_string()),
    }.items():
        pq.write_table(pa.table({"text": column}), tmp_path / name)
    assert texts(tmp_path) == ["x", "y", "x", "z"]


def test_a_zst_file_is_read_across_frames_and_skippable_frames(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.zst"
    skippable = (0x184D2A50).to_bytes(4, "little") + (3).to_bytes(4, "little") + b"abc"
    frames = [zstandard.compress(part) for part in (b"one ", b"", b"two")]
    path.write_bytes(frames[0] + skippable + frames[1] + frames[2] + skippable)
    assert texts(path) == ["one two"]


def test_a_gz_file_is_read_across_members(tmp_path: Path) -> None:
    path = tmp_path / "a.txt.gz"
    path.write_bytes(gzip.compress(b"one ") + gzip.compress(b"two"))
    assert texts(path) == ["one two"]


def test_blank_lines_of_jsonl_are_skipped_and_count_in_line_numbers(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "web.jsonl", '{"text": "a"}', "", " \r", '{"text": "b"}')
    assert [document.position for document in read_all(path)] == ["web.jsonl:1", "web.jsonl:4"]


def test_a_byte_order_mark_before_jsonl_is_removed(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}')
    assert texts(path) == ["a"]


def test_empty_texts_are_kept(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", '{"text": ""}', '{"text": "b"}')
    assert texts(path) == ["", "b"]


def test_all_supported_files_of_a_folder_are_read_in_sorted_order(tmp_path: Path) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / ".cache").mkdir()
    for name in ("z.txt", "deep/b.md", "a.rst", "ignored.pdf", ".hidden.txt", ".cache/c.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path) == ["a.rst", "deep/b.md", "z.txt"]


def test_files_that_match_a_pattern_are_read(tmp_path: Path) -> None:
    for name in ("a-1.txt", "a-2.txt", "b-1.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "a-*.txt") == ["a-1.txt", "a-2.txt"]


def test_an_existing_name_with_pattern_characters_is_a_file(tmp_path: Path) -> None:
    for name in ("[a].txt", "a.txt"):
        (tmp_path / name).write_text(name)
    assert texts(tmp_path / "[a].txt") == ["[a].txt"]


def test_slices_have_absolute_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.txt").write_text("a")
    monkeypatch.chdir(tmp_path)
    assert list_slices("a.txt")[0].path == str(tmp_path / "a.txt")


def test_a_slice_survives_json(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("a")
    (piece,) = list_slices(str(tmp_path))
    assert Slice(**json.loads(json.dumps(asdict(piece)))) == piece


def test_a_file_that_changed_since_listing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    (piece,) = list_slices(str(path))
    path.write_text("two")
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(read_slice(piece))


def test_a_file_deleted_since_listing_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one")
    (piece,) = list_slices(str(path))
    path.unlink()
    with pytest.raises(SourceUnreadableError, match=r"a\.txt: No such file"):
        list(read_slice(piece))


@pytest.mark.parametrize("source", ["", "nowhere", "nowhere/*.txt"])
def test_a_nonexistent_source_is_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SourceMissingError):
        list_slices(source)


@pytest.mark.parametrize("name", ["a.pdf", "a.parquet.gz", "a.gz", "a"])
def test_a_source_without_a_supported_suffix_names_the_suffixes(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("a")
    with pytest.raises(SourceMissingError, match=r"\.parquet, \.jsonl"):
        list_slices(str(tmp_path))


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_a_source_of_empty_files_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).touch()
    with pytest.raises(SourceEmptyError):
        list_slices(str(tmp_path))


def test_a_parquet_file_without_rows_is_empty(tmp_path: Path) -> None:
    with pytest.raises(SourceEmptyError):
        list_slices(str(write_parquet(tmp_path / "a.parquet", [])))


BAD_LINES = {
    "invalid JSON": ('{"text": bad}', r"web\.jsonl:2: not valid JSON \(Expecting value at column"),
    "brackets too deep": ('{"text": ' + "[" * 100_000, r"web\.jsonl:2: not valid JSON"),
    "a list": ("[1]", r"web\.jsonl:2: a JSON list, not an object"),
    "no such column": ('{"body": "a", "id": 1}', r"web\.jsonl:2: no column 'text'.* body, id"),
    "a null": ('{"text": null, "id": 1}', r"web\.jsonl:2: column 'text' is null .* text, id"),
    "a number": ('{"text": 5}', r"web\.jsonl:2: column 'text' is of type int"),
}


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_reported_with_its_number(tmp_path: Path, name: str) -> None:
    line, message = BAD_LINES[name]
    path = write_jsonl(tmp_path / "web.jsonl", '{"text": "good"}', line)
    with pytest.raises(BadRecordError, match=message):
        read_all(path)


@pytest.mark.parametrize("name", ["a.jsonl", "a.txt"])
def test_invalid_utf8_is_reported_with_its_line(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b'{"text": "good"}\n{"text": "\xff"}\n')
    with pytest.raises(BadRecordError, match=rf"{name}:2: byte 0xFF is not valid UTF-8"):
        read_all(tmp_path)


def test_a_null_in_parquet_is_reported_with_its_row(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a", "b", "c", None])
    with pytest.raises(BadRecordError, match=r"a\.parquet row 3: .* is null .* id, text"):
        read_all(path)


def test_invalid_utf8_in_parquet_is_reported_with_its_row(tmp_path: Path) -> None:
    column = pa.array([b"a", b"\xff"], pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet")
    with pytest.raises(BadRecordError, match=r"a\.parquet row 1: .* UTF-8"):
        read_all(tmp_path)


def test_a_missing_parquet_column_is_detected_during_listing(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(SourceUnreadableError, match=r"'body'.* id, text: .*`text_column`"):
        list_slices(str(path), Columns(text="body"))


def test_a_parquet_column_of_numbers_is_detected_during_listing(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet", ["a"])
    with pytest.raises(SourceUnreadableError, match="has type int64, not strings"):
        list_slices(str(path), Columns(text="id"))


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_truncated_anywhere_is_unreadable(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    if name == "a.parquet":
        write_parquet(path, ["some text"] * 20)
    else:
        path.write_bytes(COMPRESS[path.suffix](b'{"text": "some text"}\n' * 20))
    whole = path.read_bytes()
    for length in range(0, len(whole), 7):
        path.write_bytes(whole[:length])
        with pytest.raises(SourceUnreadableError, match=r"truncated"):
            read_all(path)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_file_of_another_format_than_its_suffix_is_unreadable(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / name, '{"text": "a"}')
    with pytest.raises(SourceUnreadableError, match=name):
        read_all(tmp_path)


def test_a_file_without_read_permission_is_unreadable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(SourceUnreadableError, match=r"a\.txt: Permission denied"):
        list_slices(str(tmp_path))


def test_the_error_of_a_source_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(MegabackError) as caught:
        list_slices(str(tmp_path / "nowhere"))
    assert "\n" not in str(caught.value)
