"""Ranks that start from one model folder verify a part of its files each."""

from collections.abc import Callable
from pathlib import Path

import pytest

from data_pipeline.errors import CheckpointCorruptError
from data_pipeline.text.codec import TextCodec
from megaback.weights import weight_files
from megaback.weights.init_from import open_base
from tests.helpers.models import random_model, write_model

RANKS = 3


@pytest.fixture
def folder(tmp_path: Path, codec: Callable[..., TextCodec]) -> Path:
    """A model in several files."""
    return write_model(tmp_path / "model", random_model(), codec(), max_file_bytes=10_000)


def open_by_rank(folder: Path, codec: TextCodec, rank: int) -> None:
    model = random_model()
    open_base(folder, model.shape, model.vocab_size, codec.format, "the run", rank, RANKS)


def test_each_file_is_hashed_by_one_rank(
    folder: Path, codec: Callable[..., TextCodec], monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed: list[str] = []
    real = weight_files.size_and_hash

    def noting(path: Path) -> tuple[int, str]:
        hashed.append(path.name)
        return real(path)

    monkeypatch.setattr(weight_files, "size_and_hash", noting)
    for rank in range(RANKS):
        before = len(hashed)
        open_by_rank(folder, codec(), rank)
        assert len(hashed) > before

    assert sorted(hashed) == sorted(path.name for path in folder.glob("*.safetensors"))


def test_a_damaged_file_is_found_by_one_rank(folder: Path, codec: Callable[..., TextCodec]) -> None:
    path = max(folder.glob("*.safetensors"))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)

    errors = []
    for rank in range(RANKS):
        try:
            open_by_rank(folder, codec(), rank)
        except CheckpointCorruptError as error:
            errors.append(str(error))

    assert [path.name in error for error in errors] == [True]
