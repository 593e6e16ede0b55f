"""Mutated files of a data set: reads are equal, or raise one of our errors."""

import json
import shutil
import tracemalloc
from collections.abc import Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.build.command import build_shards
from data_pipeline.build.plan import Plan
from data_pipeline.errors import MegabackError, ShardCorruptError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import MANIFEST_NAME, Manifest
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.seek_table import SeekEntry
from data_pipeline.shards.verify import shard_damage
from data_pipeline.sources.columns import ExampleColumns
from tests.helpers.builds import Codecs, make_settings, write_records
from tests.helpers.shard_parts import ShardParts

MAX_BYTES = 64 << 20
NUMBERS = st.one_of(
    st.integers(-3, 300),
    st.integers(0, 70).map(lambda power: 1 << power),
    st.integers(0, 70).map(lambda power: (1 << power) - 1),
    st.just(10**400),
)
NAMES = st.one_of(
    st.text(max_size=8),
    st.sampled_from(
        ["../../.bashrc", "train-00000-00000.zst", "val-00000-00000.zst", "/", "0" * 64]
    ),
    st.from_regex(r"(train|val)-[0-9]{5}-[0-9]{5}\.zst", fullmatch=True),
)
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.floats() | NAMES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Path to every value within a JSON value."""
    if not isinstance(value, dict | list):
        return
    for key, one in value.items() if isinstance(value, dict) else enumerate(value):
        yield (*path, key)
        yield from places(one, (*path, key))


@st.composite
def mutated(draw: st.DrawFn, value: Any) -> Any:
    """A JSON value with some parts replaced, removed, doubled or swapped."""
    changed = deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        all_places = list(places(changed))
        if not all_places:
            break
        *way, key = draw(st.sampled_from(all_places))
        holder = changed
        for step in way:
            holder = holder[step]
        match draw(st.integers(0, 4)):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.append(deepcopy(holder[key]))
            case 2 if isinstance(holder, dict):
                other = draw(st.sampled_from(sorted(holder)))
                holder[key], holder[other] = holder[other], holder[key]
            case 3 if type(holder[key]) is int:
                holder[key] += draw(st.sampled_from([-1, 1, -holder[key], holder[key]]))
            case _:
                holder[key] = draw(VALUES)
    return changed


@pytest.fixture(scope="module")
def data_sets(
    codec: Codecs, english_documents: list[str], tmp_path_factory: pytest.TempPathFactory
) -> list[Path]:
    """Two small data sets, of documents and of examples."""
    place = tmp_path_factory.mktemp("mutated")
    texts = write_records(
        place / "texts.jsonl", [{"text": text} for text in english_documents[:60]]
    )
    rows = [
        {"instruction": text[:30], "output": text[30:60]}
        for text in english_documents[:60]
        if len(text) > 60
    ]
    examples = write_records(place / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context():
        build_shards(make_settings(texts, codec()), codec(), place / "documents", workers=1)
        of_examples = make_settings(
            examples, codec(), examples=ExampleColumns(), row_tokens=128, shard_tokens=512
        )
        build_shards(of_examples, codec(), place / "examples", workers=1)
    return [place / "documents", place / "examples"]


def bounded(function: Any, *arguments: Any) -> Any:
    """Result of a call, or our error. Checks that it takes little memory."""
    tracemalloc.start()
    try:
        return function(*arguments)
    except MegabackError as error:
        return error
    finally:
        peak_bytes = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak_bytes < MAX_BYTES


@pytest.mark.parametrize("number", [0, 1])
def test_any_manifest_reads_equal_or_is_refused(number: int, data_sets: list[Path]) -> None:
    fields = json.loads((data_sets[number] / MANIFEST_NAME).read_text())
    intact = Manifest.load(data_sets[number])

    @settings(max_examples=300)
    @given(mutated(fields))
    def check(changed: Any) -> None:
        read = bounded(Manifest.from_json, json.dumps(changed).encode(), "manifest.json")
        if isinstance(read, Manifest):
            assert read.fingerprint == intact.fingerprint
            for entry in read.shards:
                assert Path(entry.file).name == entry.file
                assert entry.file.startswith(f"{entry.split}-")
            assert len({entry.file for entry in read.shards}) == len(read.shards)
            assert read.frame_tokens == intact.frame_tokens
            assert read.vocab_size <= 1 << 21
        else:
            assert isinstance(read, ShardCorruptError)

    check()


@pytest.mark.parametrize("number", [0, 1])
def test_any_plan_is_read_or_refused(number: int, data_sets: list[Path], tmp_path: Path) -> None:
    fields = json.loads((data_sets[number] / "plan.json").read_text())

    @settings(max_examples=150)
    @given(mutated(fields))
    def check(changed: Any) -> None:
        (tmp_path / "plan.json").write_text(json.dumps(changed))
        read = bounded(Plan.load, tmp_path)
        if isinstance(read, Plan):
            assert sum(len(task.portions) for task in read.tasks) == len(read.portions)
            assert json.loads(read.to_json())["format"] == "megaback-plan"

    check()


@st.composite
def mutated_shard(draw: st.DrawFn, data: bytes) -> bytes:
    """A shard with another header, other sizes, other counts, or other bytes."""
    parts = ShardParts.of(data)
    for _ in range(draw(st.integers(1, 2))):
        match draw(st.integers(0, 6)):
            case 0:
                parts.header = draw(mutated(parts.header))
            case 1:
                place = draw(st.integers(0, len(parts.entries) - 1))
                sizes = st.integers(0, (1 << 32) - 1) | st.integers(0, 600)
                entry = parts.entries[place]
                parts.entries[place] = draw(
                    st.builds(
                        SeekEntry,
                        sizes | st.just(entry[0]),
                        sizes | st.just(entry[1]),
                        sizes | st.just(entry[2]),
                    )
                )
            case 2:
                parts.entries = draw(st.permutations(parts.entries))
            case 3:
                parts.counts = draw(st.binary(max_size=60))
            case 4:
                parts.header_json = draw(st.binary(min_size=1, max_size=60))
            case 5:
                parts.entries.append(SeekEntry(*draw(st.tuples(*[st.integers(0, 99)] * 3))))
            case _:
                whole = bytearray(parts.joined())
                place = draw(st.integers(0, len(whole) - 1))
                stop = place + draw(st.integers(0, 20))
                whole[place:stop] = draw(st.binary(max_size=20))
                return bytes(whole)
    return parts.joined()


def contents(folder: Path, manifest: Manifest, file: str) -> object:
    (entry,) = (entry for entry in manifest.shards if entry.file == file)
    with DataSet.open(folder).open_shard(entry) as reader:
        marks = [reader.marks(frame) for frame in range(reader.num_frames)]
        return (
            reader.tokens(0, entry.tokens).tolist(),
            reader.counts().tolist(),
            [ids.tolist() for ids in reader.documents()],
            [None if one is None else one.tolist() for one in marks],
        )


@pytest.mark.parametrize("number", [0, 1])
def test_any_shard_reads_equal_or_is_refused(
    number: int, data_sets: list[Path], tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(data_sets[number], tmp_path / "shards"))
    manifest = Manifest.load(folder)
    entry = manifest.split("train")[0]
    intact_bytes = (folder / entry.file).read_bytes()
    intact = contents(folder, manifest, entry.file)

    @settings(max_examples=300)
    @given(mutated_shard(intact_bytes))
    def check(changed: bytes) -> None:
        (folder / entry.file).write_bytes(changed)
        read = bounded(contents, folder, manifest, entry.file)
        assert isinstance(read, ShardCorruptError) or read == intact
        # Also with an untrusted manifest that agrees with the shard.
        alone = bounded(ShardReader, folder / entry.file)
        if isinstance(alone, ShardReader):
            bounded(read_alone, alone)
        damage = bounded(shard_damage, folder, entry, DataSet.open(folder))
        assert damage or changed == intact_bytes

    check()


def read_alone(reader: ShardReader) -> None:
    with reader:
        for frame in range(reader.num_frames):
            reader.frame(frame)
            reader.marks(frame)
        reader.text_tokens()
        for _ in reader.documents():
            pass
