"""Files of `write_tensors`, read by the safetensors library, and errors of writing."""

import hashlib
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from megaback.checkpoints import safetensors_file
from megaback.checkpoints.safetensors_file import SizeAndHash, size_and_hash, write_tensors

Shape = tuple[int, ...]

dtypes = st.sampled_from([torch.float32, torch.bfloat16])
shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)
files = st.dictionaries(st.text(max_size=20), st.tuples(dtypes, shapes), max_size=6)


def write(path: Path, tensors: dict[str, Tensor]) -> SizeAndHash:
    specs = {name: (tensor.dtype, tensor.shape) for name, tensor in tensors.items()}
    return write_tensors(path, specs, tensors.__getitem__)


def assert_reads_back(path: Path, tensors: dict[str, Tensor]) -> None:
    read = load_file(path)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name], tensor)


@given(files, st.integers(0, 99))
def test_the_library_reads_the_tensors_that_were_written(
    specs: dict[str, tuple[torch.dtype, Shape]], seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (dtype, shape) in specs.items()
    }
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"
        returned = write(path, tensors)

        data = path.read_bytes()
        assert returned == size_and_hash(path) == (len(data), hashlib.sha256(data).hexdigest())
        assert_reads_back(path, tensors)


@given(st.text(max_size=20))
def test_data_is_aligned_for_any_name(name: str) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "tensors"
        num_bytes, _ = write(path, {name: torch.zeros(2)})

        assert (num_bytes - 8) % 8 == 0


@pytest.mark.parametrize("block_bytes", [1, 7, 64])
def test_a_tensor_longer_than_a_block_is_whole(
    block_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(safetensors_file, "_WRITE_BYTES", block_bytes)
    tensors = {"a": torch.randn(5, 7), "b": torch.randn(3)}

    assert write(tmp_path / "tensors", tensors) == size_and_hash(tmp_path / "tensors")
    assert_reads_back(tmp_path / "tensors", tensors)


def test_a_tensor_is_written_in_logical_order_and_the_requested_type(
    tmp_path: Path,
) -> None:
    tensor = torch.randn(4, 6, requires_grad=True)
    write_tensors(tmp_path / "tensors", {"a": (torch.bfloat16, (6, 4))}, lambda _: tensor.T)

    assert_reads_back(tmp_path / "tensors", {"a": tensor.detach().T.bfloat16()})


def test_each_tensor_is_created_when_it_is_written(tmp_path: Path) -> None:
    path, seen = tmp_path / "tensors", []

    def make(name: str) -> Tensor:
        seen.append((name, path.stat().st_size))
        return torch.zeros(100)

    write_tensors(path, dict.fromkeys("cab", (torch.float32, (100,))), make)

    (first, start), *others = seen
    assert (first, others) == ("c", [("a", start + 400), ("b", start + 800)])


@pytest.mark.parametrize("length", [0, 1, 100_000])
def test_a_full_disk_is_reported_with_the_path(length: int) -> None:
    with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
        write(Path("/dev/full"), {"a": torch.zeros(length)})


def test_a_disk_that_fills_up_while_writing_is_reported_with_the_path(
    tmp_path: Path, full_disk: Callable[[], AbstractContextManager[None]]
) -> None:
    path = tmp_path / "tensors"
    with full_disk(), pytest.raises(OSError, match=str(path)):
        write(path, {name: torch.zeros(10_000) for name in "abc"})

    assert 40_000 < path.stat().st_size < 120_000


@given(st.binary(max_size=100))
def test_size_and_hash_of_any_content_are_correct(content: bytes) -> None:
    with TemporaryDirectory() as folder:
        path = Path(folder) / "file"
        path.write_bytes(content)

        assert size_and_hash(path) == (len(content), hashlib.sha256(content).hexdigest())
