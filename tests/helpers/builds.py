"""Helpers for tests of builds: sources, settings, and the hashes of a folder."""

import hashlib
import json
import subprocess
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import pytest

from data_pipeline.build.command import build_shards
from data_pipeline.build.settings import BuildSettings
from data_pipeline.common import process_pool
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import SPLITS, Manifest
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec
from tests.helpers.stored import document_ids

with suppress(ImportError):
    # If a thread loads it, its use after the end of that thread crashes.
    import kitoken  # noqa: F401

Codecs = Callable[..., TextCodec]
Run = Callable[..., subprocess.CompletedProcess[str]]

EMPTY_DOCUMENTS = 3
HARD_TEXTS = [
    " ",
    "\n",
    "\x00",
    "\ud800 and \udfff",
    "<|endoftext|><|im_start|>",
    "\u2581 \u2581\u2581",
    "e\u0301\U0001f600\u4e2d\u6587",
    "  double  spaces\r\nand\ttabs ",
]


def write_source(folder: Path, texts: list[str], num_files: int = 6) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(num_files):
        lines = [json.dumps({"text": text}) + "\n" for text in texts[number::num_files]]
        (folder / f"{number}.jsonl").write_text("".join(lines))
    return folder


def make_settings(source: Path | str, codec: TextCodec, **changed: object) -> BuildSettings:
    settings = BuildSettings(
        sources=(WeightedSource(str(source)),),
        tokenizer_sha256=codec.format.tokenizer_sha256,
        direction=codec.format.direction.value,
        unit=codec.format.unit.value,
        val_fraction=0.1,
        frame_tokens=256,
        shard_tokens=1500,
    )
    return replace(settings, **changed)


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 of every file in a folder, by name."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_records(path: Path, records: Sequence[dict[str, object]]) -> Path:
    """Write a jsonl or parquet file, by its suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        import pyarrow
        import pyarrow.parquet

        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(list(records)), path)
    else:
        path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@contextmanager
def building_in_threads() -> Iterator[None]:
    """Within the block, builds start threads instead of processes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            process_pool, "ProcessPoolExecutor", lambda workers, **_: ThreadPoolExecutor(workers)
        )
        yield


def build_here(
    settings: BuildSettings,
    codec: TextCodec,
    out: Path,
    workers: int = 1,
    num_tasks: int | None = None,
) -> Manifest:
    """Build in threads of this process; usable where a fixture would be shared by examples."""
    with building_in_threads():
        return build_shards(settings, codec, out, workers, num_tasks)[0]


def documents_of(folder: Path) -> dict[str, list[str]]:
    """The texts of every split, in order, from the shards alone."""
    codec = DataSet.open(folder).codec()
    return {
        split: [codec.render(ids) for ids in document_ids(DataSet.open(folder), split)]
        for split in SPLITS
    }
