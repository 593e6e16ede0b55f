"""Rows of benchmarks are read from folders and from data sets of the hub."""

import json
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from data_pipeline.errors import BadRecordError, SourceMissingError
from megaback.suites.data import read_benchmark
from megaback.suites.rows import BENCHMARKS
from tests.helpers.benchmark_rows import EXAMPLES


def test_other_rows_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SourceMissingError, match="has no piqa/plain_text/validation"):
        read_benchmark("piqa", BENCHMARKS["piqa"], str(tmp_path), None)
    place = tmp_path / "hellaswag" / "none" / "validation"
    datasets.Dataset.from_list([{"text": "a"}]).save_to_disk(str(place))
    with pytest.raises(BadRecordError, match="row 0 of hellaswag"):
        read_benchmark("hellaswag", BENCHMARKS["hellaswag"], str(tmp_path), None)


def test_rows_of_a_local_data_set_are_read_as_those_of_the_hub(tmp_path: Path) -> None:
    rows = [EXAMPLES["piqa"][0]] * 2
    (tmp_path / "validation.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    benchmark = replace(BENCHMARKS["piqa"], hub=str(tmp_path), saved="absent")
    found = read_benchmark("piqa", benchmark, None, 1)

    assert [row.choices[0].context for row in found.rows] == ["Question: Open it.\nAnswer:"]
    absent = replace(benchmark, hub=str(tmp_path / "absent"))
    with pytest.raises(SourceMissingError, match=r"with validation\.suite_folder"):
        read_benchmark("piqa", absent, None, 1, "validation.suite_folder")
