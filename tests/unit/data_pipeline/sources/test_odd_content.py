"""Odd but legal files: byte order marks, UTF-16, JSON arrays, and parquet's many schemas."""

import gzip
import json
import tempfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.errors import BadRecordError, SourceEmptyError, SourceUnreadableError
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.documents import AnyColumns, Columns, Document
from data_pipeline.sources.json_array import read_array
from data_pipeline.sources.jsonl import Record, read_records
from data_pipeline.sources.registry import list_source, read_slice

MARK = b"\xef\xbb\xbf"
ENCODINGS = ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-le", "utf-32-be"]


def marked(text: str, encoding: str) -> bytes:
    """A text with its byte order mark."""
    has_mark = encoding in ("utf-8-sig", "utf-16", "utf-32")
    return (text if has_mark else f"\ufeff{text}").encode(encoding)


def read(
    source: Path, columns: AnyColumns = Columns(), *, skips_bad: bool | None = None
) -> tuple[list[Document], list[BadRecordError]]:
    bad: list[BadRecordError] = []
    listing = list_source(str(source), columns, skips_bad=skips_bad)
    on_bad_record = (bad.append,) if skips_bad else ()
    documents = [
        document
        for piece in listing.slices
        for document in read_slice(piece, columns, *on_bad_record)
    ]
    return documents, bad


def texts(source: Path, columns: AnyColumns = Columns()) -> list[str]:
    return [document.text for document in read(source, columns)[0]]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_byte_order_mark_sets_the_encoding_and_is_removed(
    tmp_path: Path, encoding: str, suffix: str
) -> None:
    text = "Grüße\r\n\U0001f600 \ufeff."
    data = marked(text, encoding)
    (tmp_path / f"a.txt{suffix}").write_bytes(gzip.compress(data) if suffix else data)
    assert texts(tmp_path) == [text]


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
def test_records_may_have_a_byte_order_mark(tmp_path: Path, encoding: str, name: str) -> None:
    data = '{"text": "Grüße"}\r\n{"text": "\U0001f600"}\r\n'
    (tmp_path / name).write_bytes(marked(data, encoding))
    assert texts(tmp_path) == ["Grüße", "\U0001f600"]
    records = list(read_records(str(tmp_path / name)))
    assert [record.fields["text"] for record in records if isinstance(record, Record)] == [
        "Grüße",
        "\U0001f600",
    ]


def test_any_line_may_begin_with_a_byte_order_mark(tmp_path: Path) -> None:
    part = MARK + b'{"text": "one"}\n'
    (tmp_path / "a.jsonl").write_bytes(part + MARK + b"\n" + part)
    assert texts(tmp_path) == ["one", "one"]


def test_text_that_contradicts_its_byte_order_mark_is_reported(tmp_path: Path) -> None:
    broken = marked('{"text": "x"}\n', "utf-16-le") + b"\x00\xd8"
    (tmp_path / "a.txt").write_bytes(broken)
    with pytest.raises(BadRecordError, match=r"a\.txt:2: .* not valid UTF-16"):
        texts(tmp_path)
    (tmp_path / "a.txt").rename(tmp_path / "a.jsonl")
    with pytest.raises(SourceUnreadableError, match=r"a\.jsonl: not valid UTF-16"):
        texts(tmp_path)
    with pytest.raises(SourceUnreadableError, match=r"a\.jsonl: not valid UTF-16"):
        list(read_records(str(tmp_path / "a.jsonl")))


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    elements=st.lists(values, max_size=6),
    size=st.integers(1, 30),
    indent=st.none() | st.integers(0, 2),
    is_ascii=st.booleans(),
)
def test_an_array_is_parsed_as_by_json_for_any_chunks(
    elements: list[Any], size: int, indent: int | None, is_ascii: bool
) -> None:
    data = json.dumps(elements, indent=indent, ensure_ascii=is_ascii).encode("utf-8") + b" \n"
    chunks = (data[start : start + size] for start in range(0, len(data), size))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.sources.json_array._MIN_READ_CHARACTERS", 1)
        assert list(read_array(chunks, "x")) == list(enumerate(elements, start=1))


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        ('[{"text": "a"}', "truncated file"),
        ('[{"text": "a"}, {"text": "b', "Unterminated string"),
        ('[{"text": "a"} {"text": "b"}]', "expected ',', found '{'"),
        ('[{"text": "a"},]', "at element 2"),
        ('[{"text": bad}' + " " * 100 + "]", "at element 1: Expecting value"),
        ('[{"text": "a"}]\n[1]', "text after the end of the array"),
    ],
)
def test_a_malformed_array_is_unreadable(tmp_path: Path, data: str, reason: str) -> None:
    (tmp_path / "a.json").write_text(data)
    with pytest.raises(SourceUnreadableError, match=r"a\.json: not valid JSON \(at") as caught:
        read(tmp_path, skips_bad=True)
    assert reason in str(caught.value)


def test_objects_over_several_lines_are_read(tmp_path: Path) -> None:
    records = [{"text": "one", "tags": []}, {"text": "two"}]
    spread = "\n".join(json.dumps(record, indent=2) for record in records)
    (tmp_path / "a.json").write_text(spread)
    assert read(tmp_path)[0] == [
        Document("one", "a.json element 1"),
        Document("two", "a.json element 2"),
    ]
    (tmp_path / "a.json").write_text(spread[:-3])
    with pytest.raises(SourceUnreadableError, match=r"a\.json: not valid JSON \(at element 2"):
        read(tmp_path)


def test_elements_that_are_not_records_are_named_by_number(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text('\n[{"text": "a"}, 5, {"text": null}]')
    documents, bad = read(tmp_path, skips_bad=True)
    assert documents == [Document("a", "a.json element 1")]
    assert [error.place.rpartition("/")[2] for error in bad] == [
        "a.json element 2: a JSON int, not an object with columns",
        "a.json element 3: column 'text' is null (the columns are text)",
    ]


def write(path: Path, **columns: Any) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


@pytest.mark.parametrize(
    "column",
    [
        pa.array(["x", None, "y"], pa.string()),
        pa.array(["x", None, "y"], pa.large_string()),
        pa.array(["x", None, "y"], pa.string_view()),
        pa.array(["x", None, "y"]).dictionary_encode(),
        pa.array([b"x", None, b"y"], pa.binary()),
        pa.array([b"x", None, b"y"], pa.large_binary()),
        pa.array([b"x", b"\xff", b"y"], pa.binary()),
    ],
    ids=lambda column: str(column.type),
)
def test_texts_of_every_string_type_are_read(tmp_path: Path, column: pa.Array) -> None:
    write(tmp_path / "a.parquet", text=column, id=[1, 2, 3])
    documents, bad = read(tmp_path, skips_bad=True)
    assert [document.text for document in documents] == ["x", "y"]
    assert [error.place.split(": ")[0] for error in bad] == [f"{tmp_path}/a.parquet row 1"]


@pytest.mark.parametrize(
    "empty",
    [
        pa.table({"text": pa.nulls(0)}),
        pa.table({"text": pa.array([], pa.float64())}),
        pa.table({"other": pa.array([], pa.string())}),
    ],
    ids=["null", "float", "no column"],
)
def test_a_file_without_rows_may_have_any_columns(tmp_path: Path, empty: pa.Table) -> None:
    pq.write_table(empty, tmp_path / "empty.parquet")
    with pytest.raises(SourceEmptyError):
        list_source(str(tmp_path))
    write(tmp_path / "a.parquet", text=["x"])
    assert texts(tmp_path) == ["x"]


def test_rows_of_a_column_of_nulls_are_bad_records(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", text=pa.nulls(2), language=pa.nulls(2))
    write(tmp_path / "b.parquet", text=["x"], language=pa.nulls(1))
    with pytest.raises(BadRecordError, match=r"a\.parquet row 0: column 'text' is null"):
        texts(tmp_path)
    documents, bad = read(tmp_path, Columns(language="language"), skips_bad=True)
    assert [(document.text, document.language) for document in documents] == [("x", None)]
    assert len(bad) == 2


FAULTY = {
    "no column": (pa.table({"body": ["x", "y"]}), "no column 'text'"),
    "numbers": (pa.table({"text": [1, 2]}), "column 'text' has type int64, not strings"),
    "nested": (
        pa.table({"text": [{"part": "x"}, {"part": "y"}]}),
        "column 'text' has type struct<part: string>, not strings",
    ),
    "twice": (
        pa.Table.from_arrays([pa.array(["x", "y"]), pa.array(["z", "z"])], ["text", "text"]),
        "2 columns are called 'text'",
    ),
}


@pytest.mark.parametrize("name", FAULTY)
def test_a_file_with_wrong_columns_is_refused_or_its_rows_are_skipped(
    tmp_path: Path, name: str
) -> None:
    table, cause = FAULTY[name]
    pq.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(SourceUnreadableError, match=cause) as alone:
        read(tmp_path, skips_bad=True)  # there are no other files, so the option is wrong
    assert "`on_bad_record`" not in str(alone.value)
    write(tmp_path / "b.parquet", text=["good"])
    with pytest.raises(SourceUnreadableError, match=rf"{cause}.*`on_bad_record` skip"):
        read(tmp_path, skips_bad=False)
    with pytest.raises(SourceUnreadableError, match=cause) as without_option:
        read(tmp_path)
    assert "`on_bad_record`" not in str(without_option.value)
    documents, bad = read(tmp_path, skips_bad=True)
    assert [document.text for document in documents] == ["good"]
    assert [(error.cause, error.place.split(": ")[0]) for error in bad] == [
        (cause, f"{tmp_path}/a.parquet row {row}") for row in range(2)
    ]


def test_other_columns_may_have_any_type(tmp_path: Path) -> None:
    columns = {
        "text": pa.array(["x", "y"]),
        "same": pa.array([1, 2]),
        "meta.text": pa.array(["a", "b"]),
        "meta": pa.array([{"text": "p"}, {"text": "q"}]),
        "tags": pa.array([["t"], []]),
        "__index_level_0__": pa.array([7, 8]),
    }
    table = pa.Table.from_arrays([*columns.values(), pa.array([3, 4])], names=[*columns, "same"])
    pq.write_table(table, tmp_path / "a.parquet")
    assert texts(tmp_path) == ["x", "y"]
    assert texts(tmp_path, Columns(text="meta.text")) in (["a", "b"],)


def test_names_of_columns_may_contain_dots(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", **{"q.text": ["Who?"], "a.text": ["I."]})
    columns = ExampleColumns.parse("instruction=q.text,output=a.text")
    (document,) = read(tmp_path, columns)[0]
    assert (document.text, document.response) == ("Who?", "I.")


def test_empty_json_files_in_a_folder_are_ignored(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(b"")
    (tmp_path / "b.jsonl").write_bytes(b"\r\n" + MARK + b"\r\n")
    (tmp_path / "c.jsonl").write_text('{"text": "x"}')
    with tempfile.TemporaryDirectory() as other:
        Path(other, "a.json").write_text("[]")
        Path(other, "b.json").write_text("")
        assert texts(Path(other)) == []
    assert texts(tmp_path) == ["x"]
