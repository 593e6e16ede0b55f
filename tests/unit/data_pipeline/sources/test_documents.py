"""Records: languages and their scores, and skipped bad records."""

import gzip
import json
import re
import tempfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.sources import parquet as parquet_source
from data_pipeline.sources.registry import Columns, Document, list_slices, read_slice

LANGUAGES = Columns("text", "language", "language_score")


def write_lines(path: Path, *lines: str) -> Path:
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    """Records as parquet or as JSON lines, by suffix."""
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return path
    return write_lines(path, *(json.dumps(row) for row in rows))


def read_good(source: Path | str, columns: Columns = Columns()) -> tuple[list[str], list[str]]:  # noqa: B008
    """Texts of good records, and messages of skipped ones."""
    errors: list[BadRecordError] = []
    documents = [
        document.text
        for piece in list_slices(str(source), columns)
        for document in read_slice(piece, columns, errors.append)
    ]
    return documents, [str(error) for error in errors]


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl"])
def test_language_and_score_are_read_on_request(tmp_path: Path, name: str) -> None:
    rows: list[dict[str, object]] = [
        {"text": "one", "language": "en", "language_score": 0.5},
        {"text": "two", "language": None, "language_score": None},
        {"text": "", "language": "fr", "language_score": 1.0},
    ]
    (piece,) = list_slices(str(write_rows(tmp_path / name, rows)), LANGUAGES)
    found = [
        (document.text, document.language, document.language_score)
        for document in read_slice(piece, LANGUAGES)
    ]
    assert found == [("one", "en", 0.5), ("two", None, None), ("", "fr", 1.0)]
    assert all(document.language is None for document in read_slice(piece))


def test_names_of_columns_can_be_set(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"body": "one", "tongue": "en", "sure": 1}]
    path = write_rows(tmp_path / "a.parquet", rows)
    columns = Columns("body", "tongue", "sure")
    (piece,) = list_slices(str(path), columns)
    assert list(read_slice(piece, columns)) == [Document("one", "a.parquet row 0", "en", 1.0)]


def test_scores_of_any_number_type_are_floats(tmp_path: Path) -> None:
    for name, kind in {
        "a": pa.float16(),
        "b": pa.float32(),
        "c": pa.int8(),
        "d": pa.decimal128(19),
    }.items():
        table = pa.table({"text": ["one"], "language_score": pa.array([1], pa.int64()).cast(kind)})
        pq.write_table(table, tmp_path / f"{name}.parquet")
    columns = Columns(language_score="language_score")
    for piece in list_slices(str(tmp_path), columns):
        (document,) = read_slice(piece, columns)
        assert (document.language_score, type(document.language_score)) == (1.0, float)


@pytest.mark.parametrize(
    ("columns", "option"),
    [
        (Columns(language="tongue"), "`language_column`"),
        (Columns(language_score="tongue"), "`language_score_column`"),
    ],
)
def test_a_missing_language_column_names_its_option(
    tmp_path: Path, columns: Columns, option: str
) -> None:
    parquet = write_rows(tmp_path / "a.parquet", [{"id": 1, "text": "a"}])
    with pytest.raises(SourceUnreadableError, match=rf"'tongue'.* id, text: .* with {option}$"):
        list_slices(str(parquet), columns)
    (piece,) = list_slices(str(write_lines(tmp_path / "a.jsonl", '{"text": "a"}')), columns)
    with pytest.raises(BadRecordError, match=rf"a\.jsonl:1: no column 'tongue'.*{option}"):
        list(read_slice(piece, columns))


def test_parquet_columns_of_the_wrong_type_are_detected_during_listing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.parquet", [{"id": 1, "text": "a"}])
    with pytest.raises(SourceUnreadableError, match="'id' has type int64, not strings"):
        list_slices(str(path), Columns(language="id"))
    with pytest.raises(SourceUnreadableError, match="'text' has type string, not numbers"):
        list_slices(str(path), Columns(language_score="text"))


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a", "language": 1, "language_score": 1}', "'language' is of type int"),
        ('{"text": "a", "language": "en", "language_score": "1"}', "is of type str, not a number"),
        ('{"text": "a", "language": "en", "language_score": true}', "is of type bool"),
        ('{"text": "a", "language": "en", "language_score": 1' + "0" * 400 + "}", "type int"),
    ],
)
def test_a_language_or_score_of_the_wrong_type_is_named(
    tmp_path: Path, line: str, message: str
) -> None:
    path = write_lines(tmp_path / "a.jsonl", line)
    (piece,) = list_slices(str(path), LANGUAGES)
    with pytest.raises(BadRecordError, match=message):
        list(read_slice(piece, LANGUAGES))


@pytest.mark.parametrize("columns", [Columns(language="l"), Columns(language_score="l")])
def test_a_source_without_columns_has_no_languages(tmp_path: Path, columns: Columns) -> None:
    (tmp_path / "a.txt").write_text("a")
    for source in ("novels", "pydocs", str(tmp_path)):
        with pytest.raises(SourceUnreadableError, match="has no columns"):
            list_slices(source, columns)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": bad}', "not valid JSON"),
        ("[1]", "a JSON list"),
        ('{"body": "a"}', "no column 'text'"),
        ('{"text": null}', "column 'text' is null"),
        ('{"text": 5}', "column 'text' is of type int"),
    ],
)
def test_a_bad_line_can_be_skipped(tmp_path: Path, line: str, message: str) -> None:
    good = '{"text": "good"}'
    path = write_lines(tmp_path / "web.jsonl", good, line, good, line, good)
    documents, (first, second) = read_good(path)
    assert documents == ["good"] * 3
    assert re.search(message, first)
    assert "web.jsonl:4:" in second


def test_bad_rows_of_parquet_can_be_skipped(tmp_path: Path) -> None:
    values = [b"a", b"\xff", b"b", None, b"c"]
    column = pa.array(values, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=2)
    documents, errors = read_good(tmp_path)
    assert documents == ["a", "b", "c"]
    assert [re.findall(r"row \d", error) for error in errors] == [["row 1"], ["row 3"]]


def test_a_text_file_that_is_not_utf8_can_be_skipped(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xff")
    (tmp_path / "b.txt").write_bytes(b"b")
    documents, (error,) = read_good(tmp_path)
    assert documents == ["b"]
    assert "a.txt:1: byte 0xFF is not valid UTF-8" in error


@settings(max_examples=30, deadline=None)
@given(
    values=st.lists(st.none() | st.text(max_size=5), min_size=1, max_size=40),
    batch_rows=st.integers(1, 7),
)
def test_skipping_bad_rows_keeps_the_others_unchanged(
    values: list[str | None], batch_rows: int
) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(parquet_source, "_BATCH_ROWS", batch_rows)
        path = Path(folder, "a.parquet")
        column = pa.array(values, pa.string())
        pq.write_table(pa.table({"text": column}), path, row_group_size=5)
        bad: list[BadRecordError] = []
        found = [
            document
            for piece in list_slices(str(path))
            for document in read_slice(piece, Columns(), bad.append)
        ]
    assert found == [
        Document(value, f"a.parquet row {row}")
        for row, value in enumerate(values)
        if value is not None
    ]
    assert len(bad) == values.count(None)


@pytest.mark.parametrize("name", ["a.jsonl.gz", "a.jsonl.zst", "a.parquet"])
def test_a_corrupt_file_cannot_be_skipped(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    zst = zstandard.ZstdCompressor(write_checksum=True)
    compress = {".gz": gzip.compress, ".zst": zst.compress}.get(path.suffix, bytes)
    if name == "a.parquet":
        column = [f"some text {number}" for number in range(200)]
        table = pa.table({"text": column})
        pq.write_table(table, path, row_group_size=50, write_page_checksum=True)
    else:
        path.write_bytes(compress(b'{"text": "some text"}\n' * 20))
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 3] ^= 0xFF
    path.write_bytes(whole)
    with pytest.raises(SourceUnreadableError, match="truncated, or not"):
        read_good(path)


def test_a_large_row_group_is_read_in_small_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.parquet"
    table = pa.table({"text": ["x" * 1000] * 20_000})
    pq.write_table(table, path, compression="none", use_dictionary=False, data_page_size=64 << 10)
    monkeypatch.setattr("data_pipeline.sources.files._PARQUET_BUFFER_BYTES", 64 << 10)
    (piece,) = list_slices(str(path))
    before = pa.total_allocated_bytes()
    highest = max(pa.total_allocated_bytes() - before for _ in read_slice(piece))
    assert pq.ParquetFile(path).num_row_groups == 1
    assert highest < path.stat().st_size / 10
