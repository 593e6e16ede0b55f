"""Validation of safetensors headers, before memory is allocated for tensors."""

import contextlib
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open

from data_pipeline.errors import CheckpointCorruptError
from megaback.checkpoints.safetensors_file import TensorFile, write_tensors
from megaback.checkpoints.safetensors_header import TensorHeader, open_tensors, parse_header
from tests.helpers.hostile_files import bounded

_DATA = bytes(range(64))


def header_of(path: Path) -> TensorHeader:
    file, header = open_tensors(path)
    file.close()
    return header


def tensor(dtype: str = "F32", shape: Any = (2, 2), offsets: Any = (0, 16)) -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": offsets}


def file_of(header: object, data: bytes = _DATA[:16], length: int | None = None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


GOOD = {"a": tensor(shape=[2], offsets=[0, 8]), "b": tensor(shape=[1, 2], offsets=[8, 16])}
TWICE = b'{"a":%s,"a":%s}' % ((json.dumps(tensor()).encode(),) * 2)
HOSTILE: dict[str, bytes] = {
    "nothing": b"",
    "no header": b"\0" * 7,
    "an empty header": file_of(b"", b""),
    "a length of 2**63": file_of(GOOD, length=1 << 63),
    "a length beyond the file": file_of(GOOD, length=10_000),
    "a header of 100 MB": file_of(b" " * (100 << 20)),
    "no JSON": file_of(b"{"),
    "no text": file_of(b"\xff\xfe"),
    "a list": file_of([]),
    "nesting": file_of(b"[" * 1_000_000),
    "a digit too many": file_of(b'{"a":' + b"9" * 5000 + b"}"),
    "a name twice": file_of(TWICE),
    "no tensor": file_of({"a": 7}),
    "a field less": file_of({"a": {"dtype": "F32", "shape": [4]}}),
    "metadata of numbers": file_of({"__metadata__": {"a": 1}, "a": tensor()}),
    "metadata that is a list": file_of({"__metadata__": [], "a": tensor()}),
    "an unknown type": file_of({"a": tensor("F128")}),
    "a type that is none": file_of({"a": tensor(dtype=["F32"])}),  # type: ignore[arg-type]
    "a shape of 2**60": file_of({"a": tensor(shape=[1 << 60])}),
    "a shape whose product overflows": file_of({"a": tensor(shape=[1 << 32, 1 << 32, 4])}),
    "a shape beyond int64, of nothing": file_of({"a": tensor(shape=[0, 1 << 64])}),
    "a million dimensions": file_of({"a": tensor(shape=[1] * 1_000_000)}),
    "a negative shape": file_of({"a": tensor(shape=[-2, -2])}),
    "a true shape": file_of({"a": tensor(shape=[True, 4])}),
    "a shape of fractions": file_of({"a": tensor(shape=[2.0, 2])}),
    "a shape of NaN": file_of(json.dumps({"a": tensor(shape=[float("nan")])}).encode()),
    "offsets beyond the file": file_of({"a": tensor(shape=[1 << 20], offsets=[0, 4 << 20])}),
    "negative offsets": file_of({"a": tensor(offsets=[-16, 0])}),
    "offsets that turn back": file_of({"a": tensor(offsets=[16, 0])}),
    "three offsets": file_of({"a": tensor(offsets=[0, 16, 16])}),
    "offsets of text": file_of({"a": tensor(offsets=["0", "16"])}),
    "overlapping": file_of({"a": tensor(), "b": tensor()}),
    "a hole": file_of(
        {"a": tensor(shape=[1], offsets=[0, 4]), "b": tensor(shape=[2], offsets=[8, 16])}
    ),
    "data without an entry": file_of({}, _DATA),
    "truncated data": file_of(GOOD, _DATA[:15]),
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
def test_a_hostile_header_is_refused(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    with bounded(), pytest.raises(CheckpointCorruptError, match="truncated or altered") as error:
        header_of(path)
    assert len(str(error.value)) < 500 + len(str(path))


@pytest.mark.parametrize("device", ["/dev/zero", "/dev/null", "."])
def test_only_regular_files_are_read(device: str) -> None:
    with bounded(), pytest.raises((CheckpointCorruptError, IsADirectoryError)):
        header_of(Path(device))


def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointCorruptError, match="not a regular file"):
        header_of(tmp_path / "pipe")


def test_the_header_of_a_sparse_terabyte_file_is_read_in_bounded_memory(tmp_path: Path) -> None:
    numbers = 1 << 38
    header = json.dumps({"a": tensor(shape=[numbers], offsets=[0, 4 * numbers])}).encode()
    with (tmp_path / "large").open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + 4 * numbers)
    with bounded():
        entry = header_of(tmp_path / "large").entries["a"]
    assert (entry.shape, entry.stop) == ((numbers,), 8 + len(header) + 4 * numbers)


def test_an_unsupported_type_is_reported(tmp_path: Path) -> None:
    path = tmp_path / "quantized"
    path.write_bytes(file_of({"a": tensor("I8", [16])}))
    with pytest.raises(CheckpointCorruptError, match=r"a in .* is of type I8, but only F32, BF16"):
        TensorFile(path).tensor("a")


def test_a_file_that_is_truncated_while_it_is_read_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_tensors(path, {"a": (torch.float32, (4096,))}, lambda _: torch.ones(4096))
    file = TensorFile(path)
    os.truncate(path, 4096)
    with pytest.raises(OSError, match="ends within a tensor"):
        file.tensor("a")


_SHAPES = st.lists(st.integers(0, 4), max_size=4).map(tuple)
_SPECS = st.dictionaries(
    st.text(max_size=8),
    st.tuples(st.sampled_from([torch.float32, torch.bfloat16]), _SHAPES),
    max_size=4,
)


def written(folder: str, specs: Any, seed: int) -> tuple[Path, dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {
        name: torch.randn(shape, generator=generator).to(dtype)
        for name, (dtype, shape) in specs.items()
    }
    write_tensors(Path(folder) / "file", specs, tensors.__getitem__)
    return Path(folder) / "file", tensors


@given(_SPECS, st.integers(0, 99))
def test_written_tensors_read_back_equal(specs: Any, seed: int) -> None:
    with TemporaryDirectory() as folder:
        path, tensors = written(folder, specs, seed)
        file = TensorFile(path)
        assert file.entries.keys() == tensors.keys()
        for name, expected in tensors.items():
            found = file.tensor(name)
            assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
            assert torch.equal(found, expected)


@given(_SPECS, st.data())
def test_a_mutated_file_is_refused_or_read_as_by_the_library(
    specs: Any, data: st.DataObject
) -> None:
    with TemporaryDirectory() as folder:
        path, _ = written(folder, specs, 1)
        content = bytearray(path.read_bytes())
        for _ in range(data.draw(st.integers(1, 3))):
            place = data.draw(st.integers(0, max(len(content) - 1, 0)))
            kind = data.draw(st.sampled_from(["replace", "insert", "cut"]))
            byte = data.draw(st.sampled_from(b'0123456789-.eE"{}[],:\\ \0\xff'))
            if kind == "replace" and content:
                content[place] = byte
            elif kind == "insert":
                content.insert(place, byte)
            else:
                del content[place + 1 :]
        path.write_bytes(content)
        try:
            found = header_of(path)
        except CheckpointCorruptError:
            return
        try:
            library = safe_open(path, framework="pt")
        except SafetensorError:
            pytest.fail("the library refuses what was accepted")
        assert found.entries.keys() == set(library.keys())
        for name, entry in found.entries.items():
            part = library.get_slice(name)
            assert (list(entry.shape), entry.dtype) == (part.get_shape(), part.get_dtype())
            assert entry.stop <= len(content)


@given(st.binary(max_size=200), st.integers(0, 300))
def test_parsing_any_bytes_returns_a_header_or_raises_value_error(
    content: bytes, file_bytes: int
) -> None:
    left = [content]

    def read(count: int) -> bytes:
        if count > len(left[0]):
            raise ValueError("it ends")
        part, left[0] = left[0][:count], left[0][count:]
        return part

    with contextlib.suppress(ValueError):
        parse_header(read, file_bytes)
