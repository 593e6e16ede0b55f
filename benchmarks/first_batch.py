"""Time until the first batch of a run over many shards, at its start and on resume.

    python benchmarks/first_batch.py SHARDS [--num-shards 10000]

Makes a data set of `--num-shards` shards from the first documents of some shards of SHARDS; 1 GB.
Fresh processes open it as a rank does (manifest, tokenizer, order) and read the batch of step 0 or
of step 1,000,000. The page cache is dropped before each: for all files as root, else for the data
set. The clock starts after Python has imported its modules; the time of the whole process is
printed as well. Medians, processes in turns.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import click
import numpy as np
from smoke import Benchmark

from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import Manifest, ShardEntry
from data_pipeline.shards.writer import ShardWriter
from data_pipeline.text.tokenizer import TOKENIZER_NAME

_STEPS = (0, 1_000_000)
_TEMPLATES = 8
_FRAMES = 1.1
"""Minimum frames per shard: a full one and a short one."""
_DROP_CACHES = Path("/proc/sys/vm/drop_caches")

_CHILD = """
import json, sys, time
from megaback.config import Config
from megaback.data import open_data

config = Config.model_validate(json.loads(sys.argv[1]))
started, cpu_started = time.perf_counter(), time.process_time()
data = open_data(config, 0, 1)
opened = time.perf_counter()
batches = data.training.at(int(sys.argv[2]))
done, cpu_done = time.perf_counter(), time.process_time()
data.training.close()
print(json.dumps([opened - started, done - opened, done - started, cpu_done - cpu_started]))
"""


def make_data_set(source: DataSet, folder: Path, num_shards: int) -> None:
    """A data set of many small shards with the format of a built one."""
    manifest = source.manifest
    identity = manifest.text_format.to_dict()
    id_dtype = np.dtype(f"<u{manifest.id_bytes}")
    entries: list[ShardEntry] = []
    templates: list[bytes] = []
    path = folder / "template"
    for of_source in manifest.split("train")[:_TEMPLATES]:
        with path.open("wb") as file, source.open_shard(of_source) as reader:
            writer = ShardWriter(file, identity, id_dtype, manifest.frame_tokens)
            for document in reader.documents():
                writer.add(document, 0)
                if writer.tokens > _FRAMES * manifest.frame_tokens:
                    break
            digest = writer.finish()
        entries.append(ShardEntry("", "train", **asdict(digest)))
        templates.append(path.read_bytes())
    path.unlink()
    shards = []
    for number in range(num_shards):
        name = f"train-{number:05}-00000.zst"
        (folder / name).write_bytes(templates[number % len(templates)])
        shards.append(replace(entries[number % len(entries)], file=name))
    (folder / TOKENIZER_NAME).write_bytes(source.codec().model_bytes)
    replace(manifest, shards=tuple(shards), dictionary_sha256=None).save(folder)


def config_of(folder: Path, context_tokens: int, batch_rows: int) -> str:
    """The config of a run of one rank."""
    direction = Manifest.load(folder).text_format.direction
    fields = {
        "run": str(folder / "run"),
        "data": {"shards": str(folder), "direction": direction.value},
        "model": {"num_layers": 1, "width": 64, "num_heads": 1},
        "batch": {
            "context_tokens": context_tokens,
            "global_batch_rows": batch_rows,
            "micro_batch_rows": batch_rows,
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 2_000_000},
    }
    return json.dumps(fields)


def drop_caches(folder: Path, what: str) -> str:
    """Drop the page cache, of all files as root, else of the folder; returns how."""
    os.sync()
    if what == "all":
        with suppress(OSError):
            _DROP_CACHES.write_text("3")
            return "drop_caches"
    for path in folder.iterdir():
        descriptor = os.open(path, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    return "POSIX_FADV_DONTNEED on the data set's files"


def first_batch(config: str, step: int) -> list[float]:
    """Seconds: opening, the batch, both, both in CPU time, the whole process."""
    started = time.perf_counter()
    finished = subprocess.run(
        [sys.executable, "-c", _CHILD, config, str(step)],
        stdout=subprocess.PIPE,
        check=True,
        text=True,
    )
    elapsed = time.perf_counter() - started
    return [*json.loads(finished.stdout), elapsed]


@click.command(
    cls=Benchmark,
    smoke="{shards} --num-shards 8 --context-tokens 64 --batch-rows 4 --repeats 1 --drop files",
)
@click.argument("shards")
@click.option("--num-shards", default=10_000, show_default=True, help="Number of shards to make.")
@click.option("--context-tokens", default=1024, show_default=True, help="Tokens per row.")
@click.option("--batch-rows", default=64, show_default=True, help="Rows per batch.")
@click.option(
    "--repeats", default=5, show_default=True, help="Runs per contender; medians are printed."
)
@click.option(
    "--drop",
    type=click.Choice(["all", "files"]),
    default="all",
    show_default=True,
    help="Page cache to drop: of all files, or of the data set.",
)
def main(
    shards: str, num_shards: int, context_tokens: int, batch_rows: int, repeats: int, drop: str
) -> None:
    """Print seconds until the first batch, cold and warm, at two steps."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        make_data_set(DataSet.open(shards), folder, num_shards)
        config = config_of(folder, context_tokens, batch_rows)
        how = drop_caches(folder, drop)
        manifest_bytes = (folder / "manifest.json").stat().st_size
        click.echo(
            f"{num_shards:,} shards, a manifest of {manifest_bytes / 1e6:.1f} MB, a batch of "
            f"{batch_rows} rows of {context_tokens}; cold: {how}"
        )
        found: dict[tuple[str, int], list[list[float]]] = {}
        for _ in range(repeats):
            for step in _STEPS:
                drop_caches(folder, drop)
                found.setdefault(("cold", step), []).append(first_batch(config, step))
                found.setdefault(("warm", step), []).append(first_batch(config, step))
        click.echo("files       step   open s  batch s   both s   CPU s  process s")
        for (files, step), runs in sorted(found.items()):
            medians = [statistics.median(column) for column in zip(*runs, strict=True)]
            click.echo(f"{files} {step:11,}  " + "  ".join(f"{x:7.3f}" for x in medians))


if __name__ == "__main__":
    main()
