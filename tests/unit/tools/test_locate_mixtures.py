"""`megaback locate` on runs of several data sets."""

import json
from pathlib import Path

import pytest

from data_pipeline.shards import inspection
from data_pipeline.shards.data_set import DataSet
from megaback.config_file import load_config
from tests.helpers.builds import documents_of
from tests.helpers.located import CONTEXT_OF_RUN, locate, located, reader_of, write_config


@pytest.fixture
def mixed(tmp_path: Path, finished: Path, tiny_shards: Path) -> Path:
    """Config of a run on two data sets with different frame sizes."""
    shards = [
        {"path": str(finished), "weight": 0.3},
        {"path": str(tiny_shards), "weight": 0.7},
    ]
    return write_config(tmp_path / "mixed.yaml", shards)


def test_a_row_after_a_data_set_is_dropped_is_read_by_no_step(
    tmp_path: Path, finished: Path, tiny_shards: Path
) -> None:
    shards = [{"path": str(finished), "max_epochs": 1}, {"path": str(tiny_shards)}]
    config = write_config(tmp_path / "dropped.yaml", shards, steps=1000)
    options = (config, "--document", 5, "--shards", finished)
    (first,) = located(*options)
    assert sum(row["stop"] - row["start"] for row in first["rows"]) == first["tokens"]
    (third,) = located(*options, "--epoch", 2)
    assert third["rows"] == []
    assert "no step reads it: its data set" in locate(*options, "--epoch", 2).stdout


@pytest.mark.parametrize(
    ("epoch", "weight"), [(0, 0.3), (2, 0.3), (0, {0: 0.3, 0.2: 0, 0.5: 2}), (1, {0: 0, 0.7: 1})]
)
def test_reported_rows_of_a_mixture_hold_the_documents(
    mixed: Path, finished: Path, tiny_shards: Path, epoch: int, weight: object
) -> None:
    fields = json.loads(mixed.read_text())
    fields["data"]["shards"][0]["weight"] = weight
    mixed.write_text(json.dumps(fields))
    row_ids = reader_of(load_config(mixed), 2)
    for folder in (finished, tiny_shards):
        options = ("--shards", folder, "--epoch", epoch, "--world-size", 2)
        for number in (0, 31, 100):
            (found,) = located(mixed, "--document", number, *options)
            assert found["data_set"] == str(folder)
            ids = inspection.document_at(DataSet.open(folder), "train", number)
            for row in found["rows"]:
                first = (found["shard_tokens"][0] + row["start"]) % CONTEXT_OF_RUN
                held = row_ids(row["step"], row["position"], row["rank"])
                held = held[first : first + row["stop"] - row["start"]]
                assert held.tolist() == ids[row["start"] : row["stop"]].tolist()


def test_a_text_is_located_in_every_data_set_of_a_mixture(
    mixed: Path, finished: Path, tiny_shards: Path
) -> None:
    others = documents_of(tiny_shards)["train"]
    text = next(text for text in documents_of(finished)["train"] if text in others)
    found = located(mixed, "--text", "-", text=text.encode())
    assert {document["data_set"] for document in found} == {str(finished), str(tiny_shards)}


def test_a_document_number_of_a_mixture_needs_a_data_set(mixed: Path, finished: Path) -> None:
    result = locate(mixed, "--document", 1)
    assert (result.exit_code, str(finished) in result.stderr) == (10, True)
