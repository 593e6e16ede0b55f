"""Shards of mosaicml-streaming's MDS: a folder of files of samples, with index.json.

A file, perhaps compressed: the number of samples (u32), the offsets of the samples and of their end
(u32), a description, and the samples: the sizes (u32) of their columns of no fixed size, then the
values of all columns. No pickle is read.
"""

import hashlib
import itertools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from data_pipeline.common.checked_json import briefly, checked, parse_json, require_within
from data_pipeline.common.file_names import leads_out, plain_name
from data_pipeline.common.limits import MAX_MANIFEST_BYTES
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.decompression import CORRUPT_ERRORS, decompressed
from data_pipeline.sources.tokenized.documents import AnyIds, TokenizedFormat
from data_pipeline.sources.tokenized.id_files import damaged, stamp_of_file

INDEX_NAME = "index.json"
_COMPRESSIONS = {"zstd": ".zst", "gz": ".gz", "bz2": ".bz2"}
_MAX_SHARD_BYTES = 1 << 30
"""Maximum size of a shard, which is held in memory; the writer's default is 64 MiB."""
_MASKS = ("attention_mask", "labels", "loss_mask")
_TYPES = {8: "u1", 9: "i1", 16: "<u2", 17: "<i2", 32: "<u4", 33: "<i4", 64: "<u8", 65: "<i8"}
_TYPES_BY_NAME = {np.dtype(each).name: each for each in _TYPES.values()}
_ARRAY = re.compile(r"ndarray(?::([a-z0-9]+)(?::([0-9]{1,9}))?)?")


@dataclass(frozen=True)
class MdsShard:
    """A shard as index.json describes it, with the column that is read."""

    path: Path
    group: str
    """Folder of the shard: those of one folder were written by one process, one after another."""
    compression: str | None
    raw_bytes: int
    hashes: dict[str, str]
    samples: int
    column: int
    encoding: str
    sizes: tuple[int | None, ...]
    """Fixed size of each column."""

    def stamp(self) -> str:
        return stamp_of_file(self.path)

    def values(self) -> Iterator[bytes]:
        """The value of the column in each sample. Raises OSError, SourceUnreadableError."""
        raw = self._read()
        offsets = np.frombuffer(raw, "<u4", self.samples + 1, 4).astype(np.int64)
        if offsets[0] < 4 * (self.samples + 2) or (np.diff(offsets) < 0).any():
            raise damaged(self.path, "the offsets of its samples are not in order")
        if offsets[-1] != len(raw):
            raise damaged(self.path, f"its samples end at byte {offsets[-1]:,} of {len(raw):,}")
        num_variable = self.sizes.count(None)
        bounds = offsets.tolist()
        for sample, (start, stop) in enumerate(itertools.pairwise(bounds)):
            at = start + 4 * num_variable
            if at > stop:
                raise damaged(self.path, f"sample {sample} ends within the sizes of its columns")
            variable = iter(np.frombuffer(raw, "<u4", num_variable, start).tolist())
            sizes = [next(variable) if size is None else size for size in self.sizes]
            if at + sum(sizes) != stop:
                raise damaged(self.path, f"the columns of sample {sample} are not of its size")
            at += sum(sizes[: self.column])
            yield raw[at : at + sizes[self.column]]

    def ids(self, form: TokenizedFormat) -> Iterator[AnyIds]:
        """The ids of each sample: shape (tokens,)."""
        for sample, value in enumerate(self.values()):
            try:
                yield _ids_of(value, self.encoding, form)
            except ValueError as error:
                raise damaged(self.path, f"sample {sample}: {error}") from None

    def _read(self) -> bytes:
        if self.compression is None:
            raw = read_file(self.path, _MAX_SHARD_BYTES)
        else:
            packed = BytesIO(read_file(self.path, _MAX_SHARD_BYTES))
            suffix = _COMPRESSIONS[self.compression]
            pieces = []
            num_bytes = 0
            try:
                for piece in decompressed(packed, suffix, str(self.path)):
                    num_bytes += len(piece)
                    if num_bytes > self.raw_bytes:
                        break
                    pieces.append(piece)
            except CORRUPT_ERRORS as error:
                raise damaged(self.path, f"it does not decompress ({error})") from None
            raw = b"".join(pieces)
        if len(raw) != self.raw_bytes:
            raise damaged(
                self.path, f"it does not have the {self.raw_bytes:,} bytes of {INDEX_NAME}"
            )
        for name, digest in self.hashes.items():
            if name in hashlib.algorithms_guaranteed and not name.startswith("shake"):
                found = hashlib.new(name, raw, usedforsecurity=False).hexdigest()
                if found != digest:
                    raise damaged(self.path, f"its {name} is not that of {INDEX_NAME}")
        if len(raw) < 8 or int.from_bytes(raw[:4], "little") != self.samples:
            raise damaged(self.path, f"it does not hold {self.samples:,} samples")
        if len(raw) < 4 * (self.samples + 2):
            raise damaged(self.path, "it ends within the offsets of its samples")
        return raw


def read_mds_index(folder: Path, column: str) -> list[MdsShard]:
    """The shards of a folder, in order. Raises OSError, SourceUnreadableError."""
    path = folder / INDEX_NAME
    data = read_file(path, MAX_MANIFEST_BYTES)
    try:
        fields = checked(INDEX_NAME, parse_json(data), dict)
        if fields.get("version") != 2:
            raise ValueError(f"its version is {briefly(fields.get('version'))}, not 2")
        return [_shard(folder, each, column) for each in checked("shards", fields["shards"], list)]
    except (ValueError, KeyError, TypeError) as error:
        raise damaged(path, f"{error!s:.300}") from None


def _shard(folder: Path, fields: Any, column: str) -> MdsShard:
    """Raises ValueError, KeyError, TypeError, SourceUnreadableError."""
    fields = checked("a shard", fields, dict)
    if fields.get("format") != "mds":
        raise ValueError(f"a shard's format is {briefly(fields.get('format'))}, not mds")
    names = checked("column_names", fields["column_names"], tuple[str, ...])
    encodings = checked("column_encodings", fields["column_encodings"], tuple[str, ...])
    sizes = checked("column_sizes", fields["column_sizes"], tuple[int | None, ...])
    if not len(names) == len(encodings) == len(sizes):
        raise ValueError("its columns have not one encoding and size each")
    for size in sizes:
        require_within("column_sizes", size or 0, 0, _MAX_SHARD_BYTES)
    shown = ", ".join(f"{name!r} ({kind})" for name, kind in zip(names, encodings, strict=True))
    if column not in names:
        raise SourceUnreadableError(
            f"{folder}: no column {column!r}; the columns are {shown:.300}: name the one with ids "
            "or text with `column`"
        )
    if masks := [name for name in names if name in _MASKS]:
        raise SourceUnreadableError(
            f"{folder}: column {masks[0]!r} is a mask, which documents do not have; write the data "
            "set without it to train on all tokens"
        )
    number = names.index(column)
    _require_ids_or_text(encodings[number], f"{folder}: column {column!r}")
    zipped = fields.get("zip_data")
    compression = None
    if zipped is not None:
        compression = checked("compression", fields["compression"], str).partition(":")[0]
        if compression not in _COMPRESSIONS:
            raise SourceUnreadableError(
                f"{folder}: compressed as {compression!r:.40}, which is not read; decompress it, "
                f"or write it with one of {', '.join(_COMPRESSIONS)}"
            )
    raw = checked("raw_data", fields["raw_data"], dict)
    name = PurePosixPath(checked("basename", (zipped or raw)["basename"], str))
    path = folder.joinpath(*map(plain_name, name.parts))
    if leads_out(path, folder):
        raise ValueError(f"{str(name)!r:.80} is outside its folder")
    samples = checked("samples", fields["samples"], int)
    raw_bytes = checked("bytes", raw["bytes"], int)
    require_within("samples", samples, 0, _MAX_SHARD_BYTES // 4)
    if raw_bytes > _MAX_SHARD_BYTES:
        raise SourceUnreadableError(
            f"{path}: {raw_bytes:,} bytes; a shard is held in memory, so that at most "
            f"{_MAX_SHARD_BYTES:,} are read: write it with a smaller size_limit"
        )
    return MdsShard(
        path=path,
        group=str(name.parent),
        compression=compression,
        raw_bytes=raw_bytes,
        hashes=checked("hashes", raw.get("hashes", {}), dict[str, str]),
        samples=samples,
        column=number,
        encoding=encodings[number],
        sizes=tuple(size or None for size in sizes),
    )


def _require_ids_or_text(encoding: str, where: str) -> None:
    """Raises SourceUnreadableError for an encoding of other values."""
    found = _ARRAY.fullmatch(encoding)
    if encoding in ("str", "bytes") or (found and found[1] in (None, *_TYPES_BY_NAME)):
        return
    reason = "pickles are never read" if encoding == "pkl" else "it holds neither ids nor text"
    raise SourceUnreadableError(
        f"{where} is of encoding {encoding!r:.80}: {reason}; write it as str, as bytes, or as an "
        "array of one dimension (ndarray:uint16, ndarray:int32)"
    )


def _ids_of(value: bytes, encoding: str, form: TokenizedFormat) -> AnyIds:
    """The ids of a value: bytes, or an array of one dimension. Raises ValueError."""
    if encoding == "bytes":
        return _whole(value, np.dtype(form.bytes_type))
    found = _ARRAY.fullmatch(encoding)
    assert found is not None
    at = 0
    if found[1] is None:
        code = value[0] if value else -1
        if code not in _TYPES:
            raise ValueError(f"type {code} of its array is not one of ids")
        dtype = np.dtype(_TYPES[code])
        at = 1
    else:
        dtype = np.dtype(_TYPES_BY_NAME[found[1]])
    if found[2] is None:
        if len(value) <= at or value[at] >> 2 != 1:
            raise ValueError("its array does not have one dimension")
        shape_bytes = 1 << (value[at] & 3)
        num_ids = int.from_bytes(value[at + 1 : at + 1 + shape_bytes], "little")
        at += 1 + shape_bytes
    else:
        num_ids = int(found[2])
    ids = _whole(value[at:], dtype)
    if len(ids) != num_ids:
        raise ValueError(f"its array has {len(ids):,} ids, not {num_ids:,}")
    return ids


def _whole(value: bytes, dtype: np.dtype[Any]) -> AnyIds:
    if len(value) % dtype.itemsize:
        raise ValueError(f"its {len(value):,} bytes are no whole number of {dtype.name} ids")
    return np.frombuffer(value, dtype.newbyteorder("<"))
