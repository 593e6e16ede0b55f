"""Hub data sets, in local folders with the same layout: shards, configs and errors."""

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard

from data_pipeline.errors import BadRecordError, SourceMissingError, SourceUnreadableError
from data_pipeline.sources import parquet as parquet_source
from data_pipeline.sources.registry import Columns, list_slices, read_slice
from data_pipeline.storage import retries
from tests.helpers.file_server import QUICK


def write_shard(root: Path, name: str, values: list[str | None]) -> None:
    table = pa.table({"id": list(range(len(values))), "text": pa.array(values, pa.string())})
    pq.write_table(table, root / "data" / f"{name}.parquet")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(retries, "POLICY", QUICK)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    root = tmp_path / "set"
    (root / "data").mkdir(parents=True)
    for name in ("a", "b", "c"):
        write_shard(root, name, [f"{name}0", f"{name}1", f"{name}2"])
    configs = [
        {"config_name": "all", "default": True, "data_files": "data/*.parquet"},
        {"config_name": "one", "data_files": "data/b.parquet"},
    ]
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps(configs)}\n---\n")
    return root


def test_a_hub_data_set_has_one_slice_per_file(hub_folder: Path) -> None:
    slices = list_slices(f"hf:{hub_folder}")
    assert [[document.text for document in read_slice(piece)] for piece in slices] == [
        ["a0", "a1", "a2"],
        ["b0", "b1", "b2"],
        ["c0", "c1", "c2"],
    ]


def test_a_hub_config_is_named_after_a_colon(hub_folder: Path) -> None:
    (piece,) = list_slices(f"hf:{hub_folder}:one")
    assert [document.text for document in read_slice(piece)] == ["b0", "b1", "b2"]


@pytest.mark.parametrize("suffix", [":nope", "-nope"])
def test_an_unknown_hub_name_or_config_is_missing(hub_folder: Path, suffix: str) -> None:
    with pytest.raises(SourceMissingError, match="nope"):
        list_slices(f"hf:{hub_folder}{suffix}")


def test_a_hub_source_without_a_name_is_missing() -> None:
    with pytest.raises(SourceMissingError, match="hf:NAME"):
        list_slices("hf:")


def test_a_missing_hub_column_is_detected_during_listing(hub_folder: Path) -> None:
    with pytest.raises(SourceUnreadableError, match=r"'body'.* id, text: .*`text_column`"):
        list_slices(f"hf:{hub_folder}", Columns(text="body"))


def test_a_hub_file_that_changed_since_listing_is_refused(hub_folder: Path) -> None:
    piece = list_slices(f"hf:{hub_folder}")[2]
    write_shard(hub_folder, "c", ["other"])
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(read_slice(piece))


def test_a_null_in_a_hub_data_set_is_named_by_file_and_row(hub_folder: Path) -> None:
    write_shard(hub_folder, "c", ["c0", None])
    piece = list_slices(f"hf:{hub_folder}")[2]
    with pytest.raises(BadRecordError, match=r"c\.parquet row 1"):
        list(read_slice(piece))


def test_parquet_files_of_a_hub_data_set_are_sliced_by_row_groups(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet_source, "SLICE_BYTES", 1)
    table = pa.table({"text": ["b0", "b1", "b2"]})
    pq.write_table(table, hub_folder / "data" / "b.parquet", row_group_size=1)
    slices = list_slices(f"hf:{hub_folder}:one")
    assert [(piece.kind, piece.start) for piece in slices] == [("parquet", i) for i in range(3)]
    assert [document.text for document in read_slice(slices[1])] == ["b1"]


def make_set(root: Path, name: str, data: bytes, **options: object) -> str:
    """Write a data set of one file; return its source."""
    (root / "data").mkdir(parents=True)
    (root / "data" / name).write_bytes(data)
    config = {"config_name": "all", "data_files": f"data/{name}", **options}
    (root / "README.md").write_text(f"---\nconfigs: {json.dumps([config])}\n---\n")
    return f"hf:{root}"


RECORDS = [{"text": "one", "language": "en"}, {"text": "two", "language": "de"}]
LINES = b'{"text": "one", "language": "en"}\n{"text": "two", "language": "de"}\n'


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("a.jsonl", LINES),
        ("a.jsonl.gz", gzip.compress(LINES, mtime=0)),
        ("a.jsonl.zst", zstandard.compress(LINES)),
        ("a.json", b"\n" + LINES),
        ("a.json.gz", gzip.compress(LINES, mtime=0)),
        ("a.json", json.dumps(RECORDS).encode()),
        ("a.json", json.dumps(RECORDS, indent=1).encode()),
    ],
)
def test_json_of_a_hub_data_set_is_read_directly(hub_folder: Path, name: str, data: bytes) -> None:
    columns = Columns(language="language")
    (piece,) = list_slices(make_set(hub_folder.parent / "other", name, data), columns)
    assert piece.kind == "jsonl"
    found = [(document.text, document.language) for document in read_slice(piece, columns)]
    assert found == [("one", "en"), ("two", "de")]


@pytest.mark.parametrize(
    ("name", "data", "options"),
    [
        ("a.json", json.dumps({"data": RECORDS}).encode(), {"field": "data"}),
        ("a.csv", b"text,language\none,en\ntwo,de\n", {}),
        ("a.csv", b"text;language\none;en\ntwo;de\n", {"sep": ";"}),
    ],
)
def test_other_formats_are_streamed_by_the_library(
    hub_folder: Path, name: str, data: bytes, options: dict[str, object]
) -> None:
    columns = Columns(language="language")
    source = make_set(hub_folder.parent / "other", name, data, **options)
    (piece,) = list_slices(source, columns)
    assert piece.kind == "hub"
    found = [(document.text, document.language) for document in read_slice(piece, columns)]
    assert found == [("one", "en"), ("two", "de")]


def test_data_sets_with_settings_that_select_records_are_streamed(hub_folder: Path) -> None:
    data = (hub_folder / "data" / "a.parquet").read_bytes()
    source = make_set(hub_folder.parent / "other", "a.parquet", data, columns=["text"])
    (piece,) = list_slices(source)
    assert piece.kind == "hub"
    assert [document.text for document in read_slice(piece)] == ["a0", "a1", "a2"]


def test_a_hub_data_set_of_texts_has_one_document_per_line(hub_folder: Path) -> None:
    data = b"one\r\n\ntwo\n\xff\nthree"
    (piece,) = list_slices(make_set(hub_folder.parent / "other", "a.txt", data))
    bad: list[BadRecordError] = []
    documents = list(read_slice(piece, Columns(), bad.append))
    assert [document.text for document in documents] == ["one", "two", "three"]
    assert [document.position for document in documents] == ["a.txt:1", "a.txt:3", "a.txt:5"]
    assert [error.cause for error in bad] == ["not valid UTF-8"]


def test_a_streamed_data_set_that_changed_since_listing_is_refused(hub_folder: Path) -> None:
    root = hub_folder.parent / "other"
    (piece,) = list_slices(make_set(root, "a.csv", b"text\none\n"))
    (root / "data" / "a.csv").write_bytes(b"text\ntwo\n")
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(read_slice(piece))


def test_a_bad_record_of_a_streamed_data_set_is_named_and_can_be_skipped(
    hub_folder: Path,
) -> None:
    data = b"text,id\none,1\n,2\nthree,3\n"
    (piece,) = list_slices(make_set(hub_folder.parent / "other", "a.csv", data))
    with pytest.raises(BadRecordError, match=r"shard 0 row 1: column 'text' is null"):
        list(read_slice(piece))
    errors: list[BadRecordError] = []
    documents = read_slice(piece, Columns(), errors.append)
    assert [document.text for document in documents] == ["one", "three"]
    assert len(errors) == 1


def test_a_missing_column_of_a_streamed_data_set_is_detected_during_listing(
    hub_folder: Path,
) -> None:
    source = make_set(hub_folder.parent / "other", "a.csv", b"text\none\n")
    with pytest.raises(SourceUnreadableError, match=r"'tongue'.* with `language_column`"):
        list_slices(source, Columns(language="tongue"))


def test_a_data_set_without_a_train_split_is_missing(hub_folder: Path) -> None:
    splits = [{"split": "test", "path": "data/a.txt"}]
    source = make_set(hub_folder.parent / "other", "a.txt", b"one\n", data_files=splits)
    with pytest.raises(SourceMissingError, match="no split 'train'; the splits are test"):
        list_slices(source)


def test_transient_errors_of_the_hub_are_retried(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load, failures = datasets.load_dataset_builder, iter([True, True])

    def sometimes(*arguments: object, **options: object) -> object:
        if next(failures, False):
            raise ConnectionError("Couldn't reach the hub")
        return load(*arguments, **options)

    monkeypatch.setattr(datasets, "load_dataset_builder", sometimes)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    assert len(list_slices(f"hf:{hub_folder}")) == 3


def test_retries_of_an_unreachable_hub_end(
    hub_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", False)
    with pytest.raises(SourceUnreadableError, match="refused; gave up after 4"):
        list_slices("hf:some/set")


def test_reading_a_hub_data_set_does_not_load_torch(hub_folder: Path) -> None:
    code = (
        "import sys; from data_pipeline.sources.registry import list_slices, read_slice\n"
        f"print(len(list(read_slice(list_slices('hf:{hub_folder}')[0]))), 'torch' in sys.modules)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=True,
    )
    assert result.stdout.split() == ["3", "False"]
