"""Local paths in messages."""

from pathlib import Path

import pytest

from data_pipeline.common.local_paths import with_absolute
from data_pipeline.errors import ShardsMissingError
from data_pipeline.shards.data_set import DataSet


@pytest.mark.parametrize("source", ["/data/shards", "s3://bucket/shards", "file:///data/shards"])
def test_an_absolute_address_is_unchanged(source: str) -> None:
    assert with_absolute(source) == source


def test_a_relative_data_set_that_is_missing_is_named_with_its_full_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    with pytest.raises(ShardsMissingError) as caught:
        DataSet.open("data/shards")
    expected = f"data/shards (relative to the current folder: {tmp_path}/data/shards), or its build"
    assert expected in str(caught.value)
