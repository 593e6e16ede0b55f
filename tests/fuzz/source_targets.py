"""Targets of sources: records, and files of every kind and compression."""

import bz2
import gzip
import json
import lzma
import random
import zipfile
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import zstandard
from data_targets import ALLOWED, Factory, rows, small_codec, texts
from engine import Target
from mutations import mutate_bytes, mutate_json, mutate_lines, one_of, repacked

from data_pipeline.errors import BadRecordError, MegabackError
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.documents import Columns, stop_or_skip
from data_pipeline.sources.jsonl import read_records
from data_pipeline.sources.registry import list_source, read_slice
from data_pipeline.sources.tokenized.documents import DocumentChecker, TokenizedFormat
from data_pipeline.sources.tokenized.registry import list_tokenized, read_tokenized
from data_pipeline.tokenizer.text_sample import num_bytes
from tests.helpers.tokenized_files import (
    write_datatrove,
    write_flat,
    write_llmc,
    write_mds_arrays,
    write_megatron,
)

# The first byte of an input selects the kind of file that it is read as.

_COMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".zst": zstandard.ZstdCompressor().compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}
_DECOMPRESS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.decompress,
    ".zst": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
    ".bz2": bz2.decompress,
    ".xz": lzma.decompress,
}


def of_compressed(suffixes: list[str]) -> Callable[[bytes, random.Random], bytes]:
    def unpack(data: bytes) -> dict[str, Any]:
        suffix = suffixes[data[0] % len(suffixes)]
        content = _DECOMPRESS[Path(suffix).suffix if suffix.count(".") > 1 else ""](data[1:])
        return {"kind": data[0], "content": content}

    def pack(parts: dict[str, Any]) -> bytes:
        kind = int(parts["kind"]) % 256
        suffix = suffixes[kind % len(suffixes)]
        compress = _COMPRESS[Path(suffix).suffix if suffix.count(".") > 1 else ""]
        return bytes([kind]) + compress(parts["content"])

    def inside(data: bytes, generator: random.Random) -> bytes:
        parts = unpack(data)
        change = generator.choice((mutate_lines, mutate_json, mutate_bytes))
        return pack(parts | {"content": change(parts["content"], generator)})

    def safely(data: bytes, generator: random.Random) -> bytes:
        try:
            return inside(data, generator)
        except Exception:  # noqa: BLE001 - it expects well-formed input
            return mutate_bytes(data, generator)

    return one_of([safely, repacked(unpack, pack)])


_RECORDS = [".jsonl", *(f".jsonl{suffix}" for suffix in _COMPRESS if suffix)]


def records(folder: Path) -> Target:
    def run(data: bytes) -> None:
        path = (
            folder / f"records{_RECORDS[data[0] % len(_RECORDS)]}" if data else folder / "a.jsonl"
        )
        path.write_bytes(data[1:])
        for record in read_records(str(path)):
            if isinstance(record, BadRecordError):
                str(record)

    lines = "".join(json.dumps(row) + "\n" for row in rows(8)).encode()
    seeds = [
        bytes([kind]) + _COMPRESS[Path(suffix).suffix if kind else ""](lines)
        for kind, suffix in enumerate(_RECORDS)
    ]
    return Target("records", run, seeds, of_compressed(_RECORDS), ALLOWED)


_SOURCES = [
    *(".jsonl", ".json", ".txt", ".html", ".jsonl.gz", ".json.zst", ".txt.bz2", ".jsonl.xz"),
    *(".zip", ".parquet"),
]


def source(folder: Path) -> Target:
    def run(data: bytes) -> None:
        if not data:
            return
        path = folder / f"source{_SOURCES[data[0] % len(_SOURCES)]}"
        path.write_bytes(data[1:])
        for columns in (Columns(), ExampleColumns.parse("")):
            with suppress(MegabackError):
                for piece in list_source(str(path), columns, skips_bad=True).slices[:8]:
                    for document in read_slice(piece, columns, stop_or_skip):
                        if isinstance(columns, Columns):
                            num_bytes(document.text)  # type: ignore[attr-defined]

    return Target("source", run, _seeds_of_sources(), of_compressed(_SOURCES), ALLOWED)


def _seeds_of_sources() -> list[bytes]:
    objects = [{"text": text, **row} for text, row in zip(texts(6), rows(6), strict=True)]
    lines = "".join(json.dumps(one) + "\n" for one in objects).encode()
    archive, table = BytesIO(), BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("a/b.jsonl", lines)
        file.writestr("c.txt", "\n".join(texts(3)))
    pq.write_table(pa.Table.from_pylist(objects), table)
    plain = {
        ".jsonl": lines,
        ".json": json.dumps(objects).encode(),
        ".txt": "\n\n".join(texts(4)).encode(),
        ".html": b"<html><body><p>" + texts(1)[0].encode() + b"</p></body></html>",
        ".zip": archive.getvalue(),
        ".parquet": table.getvalue(),
    }
    seeds = []
    for kind, suffix in enumerate(_SOURCES):
        inner, _, outer = suffix[1:].partition(".")
        content = plain[f".{inner}"]
        seeds.append(bytes([kind]) + (_COMPRESS[f".{outer}"](content) if outer else content))
    return seeds


_TOKENIZED = [
    *("train.bin", "train.npy", "llmc.bin", "m.idx", "a.ds.index", "a.ds.loss"),
    *("mds/index.json", "mds/shard.00000.mds"),
]


def tokenized(folder: Path) -> Target:
    """Files of token ids, each beside the unchanged others of its format."""
    codec = small_codec()
    ids = [codec.ids_of(codec.encode_document(text)).tolist() for text in texts(12)]
    write_flat(folder / "train.bin", ids, codec.end_id)
    np.save(folder / "train.npy", np.fromfile(folder / "train.bin", "<u2"))
    write_llmc(folder / "llmc.bin", ids, codec.end_id)
    write_megatron(folder / "m.bin", [[each] for each in ids])
    write_datatrove(folder / "a.ds", ids)
    (folder / "a.ds.loss").write_bytes(b"\1" * sum(map(len, ids)))
    write_mds_arrays(folder / "mds", ids)
    seeds = [bytes([n]) + (folder / name).read_bytes() for n, name in enumerate(_TOKENIZED)]

    def run(data: bytes) -> None:
        kind = data[0] % len(_TOKENIZED) if data else 0
        path = folder / _TOKENIZED[kind]
        path.write_bytes(data[1:])
        source = path.parent if path.parent != folder else folder / f"{path.name.split('.')[0]}.*"
        try:
            for joined in (False, True):
                form = TokenizedFormat(codec.end_id, codec.begin_id, joined=joined)
                checker = DocumentChecker(form, codec, 1 << 20)
                with suppress(MegabackError):
                    for piece in list_tokenized(str(source), form).slices[:8]:
                        list(read_tokenized(piece, form, checker, stop_or_skip, 1 << 20))
        finally:
            path.write_bytes(seeds[kind][1:])

    return Target("tokenized", run, seeds, mutate_bytes, ALLOWED)


TARGETS: dict[str, Factory] = {"records": records, "source": source, "tokenized": tokenized}
