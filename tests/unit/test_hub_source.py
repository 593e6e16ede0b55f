"""Hub data sets, stood for by a folder with the same layout: shards, configs and errors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from data_pipeline.errors import BadRecordError, SourceMissingError, SourceUnreadableError
from data_pipeline.sources import list_slices, read_slice


def write_shard(root: Path, name: str, values: list[str | None]) -> None:
    table = pa.table({"id": list(range(len(values))), "text": pa.array(values, pa.string())})
    pq.write_table(table, root / "data" / f"{name}.parquet")


@pytest.fixture
def hub_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
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


def test_a_hub_data_set_has_one_slice_a_shard(hub_folder: Path) -> None:
    slices = list_slices(f"hf:{hub_folder}")
    assert [[document.text for document in read_slice(piece)] for piece in slices] == [
        ["a0", "a1", "a2"],
        ["b0", "b1", "b2"],
        ["c0", "c1", "c2"],
    ]


def test_a_hub_config_is_chosen_after_a_colon(hub_folder: Path) -> None:
    (piece,) = list_slices(f"hf:{hub_folder}:one")
    assert [document.text for document in read_slice(piece)] == ["b0", "b1", "b2"]


@pytest.mark.parametrize("suffix", [":nope", "-nope"])
def test_a_hub_name_or_config_that_is_not_there_is_missing(hub_folder: Path, suffix: str) -> None:
    with pytest.raises(SourceMissingError, match="nope"):
        list_slices(f"hf:{hub_folder}{suffix}")


def test_a_hub_source_without_a_name_is_missing() -> None:
    with pytest.raises(SourceMissingError, match="hf:NAME"):
        list_slices("hf:")


def test_a_hub_column_that_is_not_there_is_found_when_listing(hub_folder: Path) -> None:
    with pytest.raises(SourceUnreadableError, match=r"'body'.* id, text: .*--text-column"):
        list_slices(f"hf:{hub_folder}", text_column="body")


def test_a_hub_data_set_that_changed_since_listing_is_refused(hub_folder: Path) -> None:
    piece = list_slices(f"hf:{hub_folder}")[0]
    write_shard(hub_folder, "c", ["other"])
    with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
        list(read_slice(piece))


def test_a_null_in_a_hub_data_set_is_named_by_shard_and_row(hub_folder: Path) -> None:
    write_shard(hub_folder, "c", ["c0", None])
    piece = list_slices(f"hf:{hub_folder}")[2]
    with pytest.raises(BadRecordError, match="shard 2 row 1"):
        list(read_slice(piece))


def test_reading_a_hub_data_set_does_not_load_torch(hub_folder: Path) -> None:
    code = (
        "import sys; from data_pipeline.sources import list_slices, read_slice\n"
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
