"""Speed of `megaback import shards`, and that no id changes: one core, memory to files to shards.

    python benchmarks/import_shards.py TOKENIZER SOURCE...

Documents of the sources are encoded once, written as each program's own writer writes them, and
imported in both directions. Every document is then read from the shards and compared, id for id.
CPU time of the tasks: reading, checks, the text's hash, reversal, markers, compression, checksums,
writing, reading back. The bound is numpy's copy of nanoGPT's file. Writers that are not installed
are named and skipped.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import click
import numpy as np
import numpy.typing as npt
from smoke import Benchmark, is_installed

from data_pipeline.build.finalize import finalize_build
from data_pipeline.build.plan_command import claim_plan
from data_pipeline.build.settings import BuildSettings
from data_pipeline.build.task import run_task
from data_pipeline.shards.data_set import DataSet
from data_pipeline.sources.registry import list_slices, read_slice
from data_pipeline.sources.tokenized.documents import TokenizedFormat
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.encoder import in_batches

Ids = npt.NDArray[np.uint16]
_LLMC_FILE_TOKENS = 1 << 20


def nanogpt(folder: Path, ended: Sequence[Ids]) -> Path:
    np.concatenate(ended).tofile(folder / "train.bin")
    return folder / "train.bin"


def llmc(folder: Path, ended: Sequence[Ids]) -> Path:
    """The end id before each document, and files of one size, which cut documents."""
    ids = np.roll(np.concatenate(ended), 1)
    for number, start in enumerate(range(0, len(ids), _LLMC_FILE_TOKENS)):
        part = ids[start : start + _LLMC_FILE_TOKENS]
        header = np.zeros(256, dtype=np.int32)
        header[:3] = 20240520, 1, len(part)
        (folder / f"{number:06d}.bin").write_bytes(header.tobytes() + part.tobytes())
    return folder


def numpy_array(folder: Path, ended: Sequence[Ids]) -> Path:
    np.save(folder / "train.npy", np.roll(np.concatenate(ended), 1))
    return folder / "train.npy"


def megatron(folder: Path, ended: Sequence[Ids]) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    builder = IndexedDatasetBuilder(str(folder / "text_document.bin"), dtype=np.uint16)
    for ids in ended:
        builder.add_document(ids, [len(ids)])
    builder.finalize(str(folder / "text_document.idx"))
    return folder / "text_document.bin"


def datatrove(folder: Path, ended: Sequence[Ids]) -> Path:
    """Shuffled, as is its default."""
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    file = TokenizedFile(str(folder), "00000_unshuffled.ds")
    for ids in ended:
        file.write(ids.tolist(), None)
    file.close()
    shuffled = file.copy("", np.random.default_rng(0).permutation(len(ended)))
    return folder / str(shuffled.filename)


def _mds(folder: Path, samples: Iterator[Any], encoding: str) -> Path:
    from streaming import MDSWriter

    with MDSWriter(
        columns={"tokens": encoding}, out=str(folder / "mds"), compression="zstd", hashes=["sha1"]
    ) as out:
        for tokens in samples:
            out.write({"tokens": tokens})
    return folder / "mds"


def mds(folder: Path, ended: Sequence[Ids]) -> Path:
    """A document per sample."""
    return _mds(folder, (ids.astype(np.int32) for ids in ended), "ndarray:int32")


def mds_rows(folder: Path, ended: Sequence[Ids]) -> Path:
    """Rows of 2,048 ids of joined documents, as llm-foundry writes them; the last one is short."""
    ids = np.concatenate(ended).astype(np.int64)
    rows = (ids[start : start + 2048].tobytes() for start in range(0, len(ids), 2048))
    return _mds(folder, rows, "bytes")


WRITERS: dict[str, tuple[Callable[[Path, Sequence[Ids]], Path], tuple[str, str] | None]] = {
    "nanoGPT": (nanogpt, None),
    "llm.c": (llmc, None),
    "numpy": (numpy_array, None),
    "Megatron-LM": (megatron, ("megatron-core", "megatron")),
    "datatrove": (datatrove, ("datatrove", "datatrove")),
    "MDS": (mds, ("mosaicml-streaming", "streaming")),
    "MDS, joined rows": (mds_rows, ("mosaicml-streaming", "streaming")),
}


def read_texts(sources: Sequence[str], num_documents: int) -> list[str]:
    pieces = (piece for source in sources for piece in list_slices(source))
    documents = (document.text for piece in pieces for document in read_slice(piece))
    return list(islice(filter(None, documents), num_documents))


def import_once(source: Path, codec: TextCodec, out: Path, *, joined: bool) -> float:
    """Import a source. Returns the CPU seconds of its tasks."""
    settings = BuildSettings(
        sources=(WeightedSource(str(source)),),
        tokenizer_sha256=codec.format.tokenizer_sha256,
        direction=codec.format.direction.value,
        tokenized=TokenizedFormat(codec.end_id, codec.begin_id, joined=joined),
    )
    plan, _ = claim_plan(settings, codec, out, None)
    started = time.process_time()
    for task in plan.tasks:
        run_task(task, out, codec.model_bytes)
    cpu_s = time.process_time() - started
    finalize_build(plan, codec, out, workers=1)
    return cpu_s


def stored_documents(out: Path) -> Counter[bytes]:
    """The documents of a data set in the order of their texts, each with its number."""
    data_set = DataSet.open(out)
    codec = data_set.codec()
    found: Counter[bytes] = Counter()
    for entry in data_set.manifest.shards:
        with data_set.open_shard(entry) as reader:
            found.update(codec.ids_of(ids).tobytes() for ids in reader.documents())
    return found


@click.command(cls=Benchmark, smoke="{tokenizer} {text} --documents 200")
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.argument("sources", nargs=-1, required=True)
@click.option("--documents", default=10_000, show_default=True, help="Documents to import.")
def main(tokenizer: Path, sources: tuple[str, ...], documents: int) -> None:
    """Print the tokens per CPU second of each format and direction, after comparing every id."""
    codecs = {each: TextCodec.load(tokenizer, each, Unit.TOKEN) for each in Direction}
    forward = codecs[Direction.FORWARD]
    texts = read_texts(sources, documents)
    _ = forward.encoder_name  # its checks are not counted
    started = time.process_time()
    encoded = [ids for batch in in_batches(texts) for ids in forward.encode_all(batch)]
    encoding_s = time.process_time() - started
    ended = [np.append(ids, forward.end_id).astype(np.uint16) for ids in encoded]
    expected = Counter(ids.astype(forward.id_dtype).tobytes() for ids in encoded)
    num_tokens = sum(map(len, encoded))
    click.echo(
        f"{len(texts):,} documents, {num_tokens:,} tokens; encoding their texts: "
        f"{num_tokens / encoding_s / 1e6:.1f} Mtok per CPU-second ({forward.encoder_name})"
    )
    with TemporaryDirectory() as name:
        for label, (write, needs) in WRITERS.items():
            if needs is not None and not is_installed(*needs):
                continue
            folder = Path(name) / label
            folder.mkdir()
            written = write(folder, ended)
            if label == "nanoGPT":
                started = time.process_time()
                np.fromfile(written, np.uint16).tofile(folder / "copy")
                copy_s = time.process_time() - started
                click.echo(
                    f"{'numpy, copy':18} {num_tokens / copy_s / 1e6:8.1f} Mtok per CPU-second"
                )
            for direction, codec in codecs.items():
                out = Path(name) / f"{label}-{direction.value}"
                joined = write is mds_rows
                cpu_s = import_once(written, codec, out, joined=joined)
                if stored_documents(out) != expected:
                    raise SystemExit(f"{label}, {direction.value}: shards hold other documents")
                click.echo(
                    f"{label:18} {num_tokens / cpu_s / 1e6:8.1f} Mtok per CPU-second, "
                    f"{direction.value}; every id of {expected.total():,} documents is equal"
                )


if __name__ == "__main__":
    main()
