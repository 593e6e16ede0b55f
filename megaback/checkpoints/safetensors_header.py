"""Header of a safetensors file: types, shapes and offsets of its tensors.

Format: https://huggingface.co/docs/safetensors: an 8-byte length, that many bytes of JSON, data. A
file may be untrusted: its header is checked against the file's size before memory is allocated for
a tensor. Loads no torch.
"""

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import IO, Any

from data_pipeline.common.checked_json import briefly
from data_pipeline.common.number_ranges import INT64_MAX
from data_pipeline.common.regular_files import UNFIT, open_file
from data_pipeline.errors import CheckpointCorruptError

_LENGTH_BYTES = 8
_MAX_HEADER_BYTES = 1 << 24
"""Enough for about 150,000 tensors. Parsed, it takes up to 25 times as much memory."""
_MAX_DIMENSIONS = 64
"""PyTorch's limit."""
_METADATA = "__metadata__"

DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits per element of each type of the format."""


@dataclass(frozen=True)
class TensorEntry:
    """Header entry of a tensor; offsets are from the beginning of the file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class TensorHeader:
    """Entries of a file's tensors by name, in the order of their data, and its metadata."""

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def open_tensors(path: Path) -> tuple[IO[bytes], TensorHeader]:
    """Open a file for reading, and parse its header. Raises CheckpointCorruptError, OSError."""
    file: IO[bytes] | None = None
    header = None
    try:
        file = os.fdopen(open_file(path), "rb", buffering=0)
        header = parse_header(partial(_read, file), os.fstat(file.fileno()).st_size)
    except ValueError as error:
        raise _damaged(path, str(error)) from None
    except OSError as error:
        if error.errno in UNFIT:
            raise _damaged(path, str(error.strerror)) from None
        raise
    else:
        return file, header
    finally:
        if header is None and file is not None:
            file.close()


def parse_header(read: Callable[[int], bytes], file_bytes: int) -> TensorHeader:
    """Parse the header of a file of `file_bytes`; `read(n)` returns its next bytes.

    Raises ValueError.
    """
    length = int.from_bytes(read(_LENGTH_BYTES), "little")
    if file_bytes < _LENGTH_BYTES or length > file_bytes - _LENGTH_BYTES:
        raise ValueError("its header is longer than the file")
    if length > _MAX_HEADER_BYTES:
        raise ValueError(f"its header has {length:,} bytes; at most {_MAX_HEADER_BYTES:,} are read")
    text = read(length).decode()
    try:
        fields = json.loads(text, object_pairs_hook=_without_repetition)
    except RecursionError:
        raise ValueError("its header is nested too deeply") from None
    if not isinstance(fields, dict):
        raise ValueError("its header is not a JSON object")
    metadata = fields.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"{_METADATA} of its header is not an object of strings")
    data_start = _LENGTH_BYTES + length
    entries = {name: _entry(name, entry, data_start) for name, entry in fields.items()}
    return TensorHeader(_in_order(entries, data_start, file_bytes), metadata)


def _entry(name: str, fields: Any, data_start: int) -> TensorEntry:
    shown = briefly(name)
    if not isinstance(fields, dict) or not fields.keys() >= {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"{shown} does not have dtype, shape and data_offsets")
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise ValueError(f"{shown} has the unknown type {briefly(dtype)}")
    if not _are_counts(shape) or len(shape) > _MAX_DIMENSIONS:
        raise ValueError(f"the shape of {shown} is {briefly(shape)}")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the data_offsets of {shown} are {briefly(offsets)}")
    start, stop = offsets
    if DTYPE_BITS[dtype] * prod(shape) != 8 * (stop - start):
        raise ValueError(f"{shown} of shape {briefly(shape)} does not have {stop - start} bytes")
    return TensorEntry(dtype, tuple(shape), data_start + start, data_start + stop)


def _in_order(
    entries: dict[str, TensorEntry], data_start: int, file_bytes: int
) -> dict[str, TensorEntry]:
    """Entries in the order of their data, which must fill the file after the header."""
    ordered = sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop))
    end = data_start
    for name, entry in ordered:
        if entry.start != end:
            shown = briefly(name)
            raise ValueError(f"the data of {shown} does not begin where the previous data ends")
        end = entry.stop
    if end != file_bytes:
        raise ValueError(f"its header describes {end:,} bytes, but it has {file_bytes:,}")
    return dict(ordered)


def _are_counts(values: Any) -> bool:
    return isinstance(values, list) and all(
        type(value) is int and 0 <= value <= INT64_MAX for value in values
    )


def _without_repetition(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise ValueError("its header has a duplicate name")
    return fields


def _read(file: IO[bytes], count: int) -> bytes:
    """Read exactly `count` bytes of an unbuffered file. Raises ValueError if it is shorter."""
    parts = []
    while count and (part := file.read(count)):
        parts.append(part)
        count -= len(part)
    if count:
        raise ValueError("it ends within its header")
    return b"".join(parts)


def _damaged(path: Path, reason: str) -> CheckpointCorruptError:
    reason = " ".join(reason.split())
    return CheckpointCorruptError(
        f"{path} is truncated or altered ({reason}); restore it, or convert the model again"
    )
