"""safetensors files, written tensor by tensor with their hash, and read by slices.

Format: https://huggingface.co/docs/safetensors (a length, a JSON header, raw little-endian data).
The library writes a dictionary of whole tensors; here each tensor can be created when it is
written, bytes are hashed on the way, and other threads keep running. The library also memory-maps
files, which inflates RSS, and kills the process if a file is truncated meanwhile; here slices are
read directly into their tensors.
"""

import errno
import hashlib
import json
import os
import resource
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import IO

import torch
from torch import Tensor

from data_pipeline.common.regular_files import open_file
from data_pipeline.errors import CheckpointCorruptError
from megaback.checkpoints.safetensors_header import open_tensors

_DTYPE_NAMES = {torch.float32: "F32", torch.bfloat16: "BF16"}
_READ_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
_WRITE_BYTES = 1 << 24

Spec = tuple[torch.dtype, Sequence[int]]
SizeAndHash = tuple[int, str]


def write_tensors(
    path: Path,
    specs: Mapping[str, Spec],
    tensor_of: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
) -> SizeAndHash:
    """Write tensors in order, each from `tensor_of(name)`, and flush them to the disk.

    `metadata`: additional metadata of the header. Returns the file's size in bytes and SHA-256.
    Raises OSError, and then leaves an incomplete file.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    position = 0
    for name, (dtype, shape) in specs.items():
        num_bytes = dtype.itemsize
        for length in shape:
            num_bytes *= length
        offsets = [position, position + num_bytes]
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": shape, "data_offsets": offsets}
        position += num_bytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # aligns the data
    digest = hashlib.sha256()
    num_bytes = 0
    try:
        with path.open("wb", buffering=0) as file:
            head = len(text).to_bytes(8, "little") + text
            num_bytes += _write(file.fileno(), memoryview(head))
            digest.update(head)
            for name, (dtype, shape) in specs.items():
                tensor = tensor_of(name).detach().to("cpu", dtype).contiguous()
                assert list(tensor.shape) == list(shape), name
                data = memoryview(tensor.reshape(-1).view(torch.uint8).numpy().data)
                for start in range(0, len(data), _WRITE_BYTES):
                    block = data[start : start + _WRITE_BYTES]
                    num_bytes += _write(file.fileno(), block)
                    digest.update(block)
                    del block
                del tensor, data  # before the next one is created
            os.fsync(file.fileno())
    except OSError as error:
        error.filename = error.filename or str(path)  # ENOSPC has no file name
        raise
    return num_bytes, digest.hexdigest()


def _write(descriptor: int, data: "memoryview[int]") -> int:
    written = 0
    while written < len(data):
        written += os.write(descriptor, data[written:])
    return written


class OpenFiles:
    """Files that stay open for reading: the last ones used, within a share of the system's limit.

    A checkpoint has two files per rank, and processes may often open no more than 1,024.
    """

    def __init__(self) -> None:
        self._files: OrderedDict[Path, IO[bytes]] = OrderedDict()
        self._max_files = max(1, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 4)

    def add(self, path: Path, file: IO[bytes]) -> None:
        """Keep an open file, and close the one unused for longest if there are too many."""
        self._files[path] = file
        if len(self._files) > self._max_files:
            self._files.popitem(last=False)[1].close()

    def descriptor(self, path: Path) -> int:
        """The descriptor of a file, which is opened again if it was closed. Raises OSError."""
        if path not in self._files:
            self.add(path, os.fdopen(open_file(path), "rb", buffering=0))
        self._files.move_to_end(path)
        return self._files[path].fileno()


class TensorFile:
    """Reader of a file's tensors, whole or in slices, into given memory."""

    def __init__(self, path: Path, open_files: OpenFiles | None = None) -> None:
        """Read the header. `open_files` is shared by the files that are read together.

        Raises OSError, CheckpointCorruptError.
        """
        self.path = path
        self._open_files = open_files or OpenFiles()
        file, header = open_tensors(path)
        self._open_files.add(path, file)
        self.entries = header.entries
        """Entries of the tensors, by name."""
        self.metadata = header.metadata

    def read(self, name: str, start: int, out: Tensor) -> None:
        """Fill the 1-D tensor `out` with elements from `start` on. Raises OSError."""
        entry = self.entries[name]
        dtype = self.dtype(name)
        is_direct = out.dtype is dtype and out.device.type == "cpu" and out.is_contiguous()
        part = out if is_direct else torch.empty(out.shape, dtype=dtype)
        data = memoryview(part.detach().view(torch.uint8).numpy().data)
        position = entry.start + start * dtype.itemsize
        assert position + len(data) <= entry.stop, name
        descriptor = self._open_files.descriptor(self.path)
        while data:
            num_bytes = os.preadv(descriptor, [data], position)
            if not num_bytes:
                raise OSError(errno.EIO, "the file ends within a tensor", str(self.path))
            position += num_bytes
            data = data[num_bytes:]
        if part is not out:
            out.copy_(part)

    def tensor(self, name: str) -> Tensor:
        """A whole tensor. Raises KeyError if there is none, OSError, CheckpointCorruptError."""
        tensor = torch.empty(self.entries[name].shape, dtype=self.dtype(name))
        self.read(name, 0, tensor.view(-1))
        return tensor

    def dtype(self, name: str) -> torch.dtype:
        """Data type of a tensor. Raises CheckpointCorruptError for an unsupported one."""
        dtype = self.entries[name].dtype
        if dtype not in _READ_DTYPES:
            raise CheckpointCorruptError(
                f"{name} in {self.path} is of type {dtype}, but only {', '.join(_READ_DTYPES)} "
                "are supported; save the model in one of them"
            )
        return _READ_DTYPES[dtype]


def size_and_hash(path: Path) -> SizeAndHash:
    """A file's size in bytes, and SHA-256."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return path.stat().st_size, digest.hexdigest()
