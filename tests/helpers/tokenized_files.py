"""Tokenized files as other programs write them, byte for byte: tests compare with their writers."""

import hashlib
import json
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import zstandard

Ids = Sequence[int]


@dataclass(frozen=True)
class Markers:
    """Ids around a document in files."""

    begin_id: int
    end_id: int


def write_flat(path: Path, documents: Sequence[Ids], end_id: int, dtype: str = "<u2") -> Path:
    """nanoGPT's .bin: ids, and an end id after each document."""
    np.array([i for ids in documents for i in (*ids, end_id)], dtype).tofile(path)
    return path


def write_llmc(path: Path, documents: Sequence[Ids], end_id: int, version: int = 1) -> Path:
    """llm.c's .bin: a header of 256 int32, and an end id before each document."""
    ids = np.array(
        [i for each in documents for i in (end_id, *each)], "<u2" if version == 1 else "<u4"
    )
    return write_llmc_ids(path, ids, version)


def write_llmc_ids(path: Path, ids: "np.ndarray[Any, Any]", version: int = 1) -> Path:
    header = np.zeros(256, "<i4")
    header[:3] = 20240520, version, len(ids)
    path.write_bytes(header.tobytes() + ids.tobytes())
    return path


def write_megatron(
    path: Path, documents: Sequence[Sequence[Ids]], dtype: str = "<i4", code: int = 4
) -> Path:
    """Megatron's `path` .bin and .idx; a document is a list of sequences."""
    arrays = [np.array(ids, dtype) for sequences in documents for ids in sequences]
    path.write_bytes(b"".join(array.tobytes() for array in arrays))
    lengths = np.array([len(array) for array in arrays], "<i4")
    size = np.dtype(dtype).itemsize
    pointers = np.concatenate([[0], np.cumsum(lengths * size)])[: len(lengths)].astype("<i8")
    firsts = np.concatenate([[0], np.cumsum([len(each) for each in documents])]).astype("<i8")
    head = struct.pack("<9sQBQQ", b"MMIDIDX\0\0", 1, code, len(lengths), len(firsts))
    path.with_suffix(".idx").write_bytes(
        head + lengths.tobytes() + pointers.tobytes() + firsts.tobytes()
    )
    return path


def write_datatrove(path: Path, documents: Sequence[Ids], dtype: str = "<u2") -> Path:
    """datatrove's .ds and .ds.index."""
    np.array([i for ids in documents for i in ids], dtype).tofile(path)
    ends = np.cumsum([len(ids) for ids in documents]).astype("<u8")
    path.with_name(f"{path.name}.index").write_bytes(ends.tobytes())
    return path


def write_mds(
    folder: Path,
    samples: Sequence[dict[str, bytes]],
    columns: dict[str, tuple[str, int | None]],
    *,
    compression: str | None = None,
    shard_samples: int = 100,
) -> Path:
    """MDS of encoded values; `columns` has the encoding and fixed size of each."""
    folder.mkdir(parents=True, exist_ok=True)
    shards = []
    names = sorted(columns)
    config: dict[str, Any] = {
        "version": 2,
        "format": "mds",
        "compression": compression,
        "hashes": ["sha1"],
        "size_limit": 1 << 26,
        "column_names": names,
        "column_encodings": [columns[name][0] for name in names],
        "column_sizes": [columns[name][1] for name in names],
    }
    for start in range(0, len(samples), shard_samples):
        packed = []
        for sample in samples[start : start + shard_samples]:
            sizes = [len(sample[name]) for name in names if columns[name][1] is None]
            values = b"".join(sample[name] for name in names)
            packed.append(np.array(sizes, "<u4").tobytes() + values)
        text = json.dumps(config, sort_keys=True).encode()
        offsets = np.cumsum([0, *map(len, packed)]) + 4 + 4 * (len(packed) + 1) + len(text)
        raw = struct.pack("<I", len(packed)) + offsets.astype("<u4").tobytes() + text
        raw += b"".join(packed)
        name = f"shard.{len(shards):05d}.mds"
        of_file = {"basename": name, "bytes": len(raw), "hashes": _hashes(raw)}
        zipped = None
        if compression is None:
            (folder / name).write_bytes(raw)
        else:
            data = zstandard.ZstdCompressor().compress(raw)
            zipped = {"basename": f"{name}.zstd", "bytes": len(data), "hashes": _hashes(data)}
            (folder / zipped["basename"]).write_bytes(data)
        shards.append({**config, "samples": len(packed), "raw_data": of_file, "zip_data": zipped})
    fields = {"version": 2, "shards": shards}
    (folder / "index.json").write_text(json.dumps(fields, sort_keys=True))
    return folder


def array_value(ids: Ids, dtype: str = "<i4") -> bytes:
    """A value of a column `ndarray:int32`: number of axes and type of the shape, shape, ids."""
    code = 0 if len(ids) < 1 << 8 else 1 if len(ids) < 1 << 16 else 2
    return bytes([1 << 2 | code]) + len(ids).to_bytes(1 << code, "little") + _raw(ids, dtype)


def write_mds_arrays(folder: Path, documents: Sequence[Ids], **how: Any) -> Path:
    """MDS with a document per sample, in a column `ndarray:int32`."""
    samples = [{"tokens": array_value(ids)} for ids in documents if len(ids)]
    return write_mds(folder, samples, {"tokens": ("ndarray:int32", None)}, **how)


def write_mds_rows(folder: Path, documents: Sequence[Ids], end_id: int, row: int = 64) -> Path:
    """MDS with rows of joined documents in a column of bytes (int64), as llm-foundry writes it."""
    ids = [i for each in documents for i in (*each, end_id)]
    ids += [end_id] * (-len(ids) % row)
    samples = [{"tokens": _raw(ids[at : at + row], "<i8")} for at in range(0, len(ids), row)]
    shard_samples = max(5, len(samples) // 8)
    return write_mds(folder, samples, {"tokens": ("bytes", None)}, shard_samples=shard_samples)


def _raw(ids: Ids, dtype: str) -> bytes:
    return np.array(ids, dtype).tobytes()


def _hashes(data: bytes) -> dict[str, str]:
    return {"sha1": hashlib.sha1(data, usedforsecurity=False).hexdigest()}


Writer = Callable[[Path, Sequence[Ids], Markers], tuple[Path, dict[str, Any]]]


def _nanogpt(
    folder: Path, documents: Sequence[Ids], markers: Markers
) -> tuple[Path, dict[str, Any]]:
    return write_flat(folder / "train.bin", documents, markers.end_id), {}


def _llmc(folder: Path, documents: Sequence[Ids], markers: Markers) -> tuple[Path, dict[str, Any]]:
    """Two files, cut within a document."""
    ids = np.array([i for each in documents for i in (markers.end_id, *each)], "<u2")
    middle = next(
        at for at in range(len(ids) // 2, len(ids)) if markers.end_id not in ids[at - 1 : at + 1]
    )
    write_llmc_ids(folder / "train_000000.bin", ids[:middle])
    write_llmc_ids(folder / "train_000001.bin", ids[middle:])
    return folder, {}


def _numpy(folder: Path, documents: Sequence[Ids], markers: Markers) -> tuple[Path, dict[str, Any]]:
    ids = np.array([i for each in documents for i in (markers.end_id, *each)], "<u2")
    np.save(folder / "edufineweb_000000.npy", ids)
    return folder / "edufineweb_000000.npy", {}


def _megatron(
    folder: Path, documents: Sequence[Ids], markers: Markers
) -> tuple[Path, dict[str, Any]]:
    """Documents of one or two sequences."""
    sequences = [
        [[*ids, markers.end_id]] if number % 3 else [ids[:1], [*ids[1:], markers.end_id]]
        for number, ids in enumerate(documents)
    ]
    return write_megatron(folder / "corpus_text_document.bin", sequences), {}


def _datatrove(
    folder: Path, documents: Sequence[Ids], markers: Markers
) -> tuple[Path, dict[str, Any]]:
    ended = [[markers.begin_id, *ids, markers.end_id] for ids in documents]
    half = len(ended) // 2
    write_datatrove(folder / "00000_tokens.ds", ended[:half])
    write_datatrove(folder / "00001_tokens.ds", ended[half:], "<u4")
    return folder, {}


def _mds(folder: Path, documents: Sequence[Ids], markers: Markers) -> tuple[Path, dict[str, Any]]:
    ended = [[*ids, markers.end_id] for ids in documents]
    return write_mds_arrays(folder, ended, compression="zstd"), {}


def _mds_rows(
    folder: Path, documents: Sequence[Ids], markers: Markers
) -> tuple[Path, dict[str, Any]]:
    return write_mds_rows(folder, documents, markers.end_id), {"joined": True}


FORMATS: dict[str, Writer] = {
    "nanogpt": _nanogpt,
    "llmc": _llmc,
    "numpy": _numpy,
    "megatron": _megatron,
    "datatrove": _datatrove,
    "mds": _mds,
    "mds rows": _mds_rows,
}
"""Writers of documents without markers: the source to name, and settings of its format."""
