"""Targets without torch: data sets, builds, sources, addresses, configs and hostfiles.

Each is made by a function of its own folder, in which megaback writes its seeds.
"""

import hashlib
import json
import random
import struct
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import zstandard
from engine import Target
from mutations import mutate_bytes, mutate_json, repacked

from data_pipeline.build.command import build_shards
from data_pipeline.build.plan import PLAN_NAME, Plan
from data_pipeline.build.settings import BuildSettings
from data_pipeline.build.task import TaskRecord, record_path
from data_pipeline.errors import MegabackError
from data_pipeline.redaction import place_of, scrub, secret_spans, shown_url
from data_pipeline.shards import index as shard_index
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import MANIFEST_NAME, SPLITS, Manifest
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.seek_table import (
    SKIPPABLE_HEADER,
    SeekEntry,
    pack_seek_table,
    read_seek_table,
)
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.tokenizer.train_tokenizer import train_tokenizer

ALLOWED = (MegabackError,)
Factory = Callable[[Path], Target]


def texts(number: int = 120) -> list[str]:
    """Sentences from a small vocabulary."""
    generator = random.Random(7)
    words = [
        "the",
        "old",
        "captain",
        "sold",
        "a",
        "broken",
        "lantern",
        "before",
        "rain",
        "began",
        "near",
        "river",
        "and",
        "said",
    ]
    return [
        " ".join(generator.choices(words, k=generator.randint(3, 40))) + f" {index}."
        for index in range(number)
    ]


def rows(number: int = 60) -> list[dict[str, str]]:
    """Instruction rows."""
    return [
        {"instruction": f"Say {n}.", "input": "", "output": text}
        for n, text in enumerate(texts(number))
    ]


def write_lines(path: Path, objects: Iterable[object]) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in objects))
    return path


@cache
def small_codec() -> TextCodec:
    """The codec of a small tokenizer that is trained on those sentences."""
    with TemporaryDirectory() as folder:
        source = write_lines(Path(folder) / "texts.jsonl", ({"text": text} for text in texts()))
        train_tokenizer(str(source), Path(folder) / "tokenizer", 400)
        path = Path(folder) / "tokenizer" / TOKENIZER_NAME
        return TextCodec.load(path, Direction.BACKWARD, Unit.TOKEN)


def shards_in(folder: Path, **options: Any) -> Path:
    """A data set of those sentences, or of instruction rows."""
    is_of_examples = "row_tokens" in options
    objects = rows() if is_of_examples else [{"text": text} for text in texts()]
    out = folder / ("examples" if is_of_examples else "shards")
    settings = BuildSettings(
        sources=(WeightedSource(str(write_lines(folder / f"{out.name}.jsonl", objects))),),
        tokenizer_sha256=small_codec().format.tokenizer_sha256,
        val_fraction=0.2,
        frame_tokens=256,
        **options,
    )
    build_shards(settings, small_codec(), out, workers=1)
    return out


def both_sets(folder: Path) -> tuple[Path, Path]:
    return shards_in(folder), shards_in(folder, row_tokens=64, examples=ExampleColumns.parse(""))


# A shard: frames, an index frame (signature, JSON header, counts), a seek table.


def unpack_shard(data: bytes) -> dict[str, Any]:
    def read_at(offset: int, size: int) -> bytes:
        return data[offset : offset + size]

    entries = read_seek_table(len(data), read_at)
    parts: dict[str, Any] = {}
    position = 0
    for number, entry in enumerate(entries[:-1]):
        size = int(entry["compressed_bytes"])
        parts[f"frame {number}"] = data[position : position + size]
        position += size
    parts["sizes"] = [int(entry["decompressed_bytes"]) for entry in entries[:-1]]
    _, _, _, header_bytes = shard_index._PREFIX.unpack_from(data, position)
    start = position + shard_index._PREFIX.size
    parts["header"] = json.loads(data[start : start + header_bytes])
    stop = position + int(entries[-1]["compressed_bytes"])
    counts = data[start + header_bytes : stop]
    parts["counts"] = zstandard.ZstdDecompressor().decompress(counts)
    return parts


def pack_shard(parts: dict[str, Any]) -> bytes:
    frames = [parts[name] for name in sorted(parts) if name.startswith("frame ")]
    header = json.dumps(parts["header"]).encode("utf-8", "surrogatepass")
    counts = zstandard.ZstdCompressor().compress(parts["counts"])
    content = shard_index._INDEX_SIGNATURE + struct.pack("<I", len(header)) + header + counts
    index = SKIPPABLE_HEADER.pack(shard_index._INDEX_MAGIC, len(content)) + content
    sizes = [*parts["sizes"], *[0] * len(frames)]
    entries = [
        SeekEntry(len(frame), int(size) % (1 << 32), int.from_bytes(frame[-4:], "little"))
        for frame, size in zip(frames, sizes, strict=False)
    ]
    table = pack_seek_table([*entries, SeekEntry(len(index), 0, 0x51D8E999)])
    return b"".join([*frames, index, table])


def read_shard(reader: ShardReader) -> None:
    """Read everything, but no more frames than a fuzzer has time for."""
    with reader:
        reader.document_tokens()
        reader.text_tokens()
        for frame in range(min(reader.num_frames, 4)):
            reader.frame(frame)
            reader.marks(frame)
        for _, _document in zip(range(50), reader.documents(), strict=False):
            pass


def shard(folder: Path) -> Target:
    sets = both_sets(folder)
    path = folder / "train-00000-00000.zst"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        read_shard(ShardReader(path, vocab_size=400))

    seeds = [file.read_bytes() for one in sets for file in sorted(one.glob("*.zst"))]
    return Target("shard", run, seeds, repacked(unpack_shard, pack_shard), ALLOWED)


def with_fingerprint(data: bytes) -> bytes:
    """A manifest with the fingerprint of its entries, so that its other fields are checked."""
    with suppress(ValueError, KeyError, TypeError, AttributeError, RecursionError):
        fields = json.loads(data)
        names = ("direction", "unit", "tokenizer_sha256", "frame_tokens")
        contents = {name: fields[name] for name in names}
        contents["shards"] = [[one["split"], one["content_sha256"]] for one in fields["shards"]]
        if fields.get("version") == 4:
            contents["row_tokens"] = fields["row_tokens"]
        text = json.dumps(contents, sort_keys=True).encode()
        fields["fingerprint"] = hashlib.sha256(text).hexdigest()
        return json.dumps(fields).encode()
    return data


def manifest(folder: Path) -> Target:
    sets = both_sets(folder)
    seeds = [(one / MANIFEST_NAME).read_bytes() for one in sets]

    def run(data: bytes) -> None:
        data = with_fingerprint(data)
        found = Manifest.from_json(data, "manifest.json")
        for split in SPLITS:
            found.total(split)
        place = sets[found.row_tokens is not None]
        (place / MANIFEST_NAME).write_bytes(data)
        data_set = DataSet.open(place)
        data_set.codec()
        for entry in found.shards[:4]:
            read_shard(data_set.open_shard(entry))

    return Target("manifest", run, seeds, mutate_json, ALLOWED)


def task_record(folder: Path) -> Target:
    out = shards_in(folder)
    path = record_path(out, 0)
    seed = path.read_bytes()
    sha256 = json.loads(seed)["task_sha256"]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        TaskRecord.load(path, sha256, out)

    return Target("task-record", run, [seed], mutate_json, ())


def plan(folder: Path) -> Target:
    seeds = [(one / PLAN_NAME).read_bytes() for one in both_sets(folder)]
    place = folder / "planned"
    place.mkdir()

    def run(data: bytes) -> None:
        (place / PLAN_NAME).write_bytes(data)
        found = Plan.load(place)
        for task in found.tasks[:100]:
            _ = task.sha256, task.input_bytes
        found.to_json()

    return Target("plan", run, seeds, mutate_json, ALLOWED)


# Addresses.

_SECRET = "Qq7planted9Zz"
_OTHER = "0therSecret8"
_SEEDS_OF_URLS = (
    f"https://user:{_OTHER}@host/x.jsonl?sig=1&id=7#t",
    f"s3://KEY:{_OTHER}@bucket/a/part-?.jsonl",
    f"simplecache::https://u:{_OTHER}@host:80/x?X-Amz-Signature=1",
    f"sftp://alice:{_OTHER}@[::1]:22/x",
    f"hf://datasets/a/b@main/x?token={_OTHER}",
    f"see https%3A%2F%2Fu%3A{_OTHER}%40host/x, or C:\\data\\a@b?c=d and ${{SAS}}",
)


def redactor(_folder: Path) -> Target:
    def run(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        shown = shown_url(text)
        assert shown_url(shown) == shown, "a shown address changes when it is shown again"
        place_of(text)
        spans = secret_spans(text)
        assert all(0 <= start <= stop <= len(text) for start, stop in spans), spans
        cleaned = scrub(text)
        assert scrub(cleaned) == cleaned, "a scrubbed text changes when it is scrubbed again"
        # A login and a value of a query around the input.
        rest = "".join(one for one in text if one.isalnum() or one in "._~/-&=;?#:@+,%")[:200]
        for planted in (
            f"https://user:{_SECRET}@host/{rest}",
            f"s3://user:{_SECRET}@host/{rest}",
            f"https://host/x?sig={_SECRET}&{rest}",
        ):
            assert _SECRET not in shown_url(planted), planted
            assert _SECRET not in scrub(f"cannot read '{planted}'"), planted

    seeds = [text.encode() for text in _SEEDS_OF_URLS]
    return Target("redactor", run, seeds, mutate_bytes, ())


def hostfile(folder: Path) -> Target:
    from launcher.ranks.hostfile import host_rank_names, read_hostfile

    path = folder / "hosts"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        hosts = read_hostfile(path)
        if sum(host.slots for host in hosts) < 10_000:
            host_rank_names(hosts)

    seeds = [b"node1 slots=8\nnode2 slots=4 # rack 2\n", b"localhost slots=1\n\n10.0.0.2 slots=2"]
    return Target("hostfile", run, seeds, mutate_bytes, ALLOWED)


def config(folder: Path) -> Target:
    from megaback.config_file import load_config

    path = folder / "config.yaml"
    root = Path(__file__).parents[2]

    def run(data: bytes) -> None:
        path.write_bytes(data)
        load_config(path).to_yaml()

    seeds = [one.read_bytes() for one in sorted((root / "configs").glob("*.yaml"))]
    seeds += [json.dumps(asdict_of(load_config(root / "configs/demo.yaml"))).encode()]
    # OSError is allowed: commands report it, and a name may be too long for the disk.
    return Target("config", run, seeds, mutate_json, (*ALLOWED, OSError))


def asdict_of(value: Any) -> Any:
    return json.loads(value.model_dump_json())


def tokenizer(folder: Path) -> Target:
    codec = small_codec()
    path = folder / "read.model"

    def run(data: bytes) -> None:
        path.write_bytes(data)
        found = TextCodec.load(path, Direction.BACKWARD, Unit.TOKEN)
        found.render(found.encode("the old captain"))

    return Target("tokenizer", run, [codec.model_bytes], mutate_bytes, ALLOWED)


TARGETS: dict[str, Factory] = {
    "shard": shard,
    "manifest": manifest,
    "task-record": task_record,
    "plan": plan,
    "redactor": redactor,
    "hostfile": hostfile,
    "config": config,
    "tokenizer": tokenizer,
}
