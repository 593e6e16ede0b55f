"""Manifest: round trips, sums, and the fingerprint of the contents."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.common.number_ranges import INT64_MAX
from data_pipeline.errors import ShardCorruptError, ShardsMissingError
from data_pipeline.shards.manifest import MANIFEST_NAME, SPLITS, Manifest, ShardEntry, shard_path
from data_pipeline.text.codec import Direction, TextFormat, Unit

SHA256 = st.text("0123456789abcdef", min_size=64, max_size=64)
COUNTS = st.integers(0, INT64_MAX)


ENTRY = ShardEntry(
    file="train-00000-00000.zst",
    split="train",
    tokens=5,
    documents=1,
    text_bytes=1,
    file_bytes=1,
    file_sha256="a" * 64,
    content_sha256="b" * 64,
)
ENTRY_FIELDS = tuple(ShardEntry.__dataclass_fields__)[-2:]
"""Numbers of examples only."""


@st.composite
def entries(draw: st.DrawFn, row_tokens: int | None, number: int) -> ShardEntry:
    split = draw(st.sampled_from(SPLITS))
    tokens = draw(st.integers(1, 1 << 20))
    of_examples = {}
    if row_tokens is not None:
        with_loss = draw(st.integers(0, tokens))
        of_examples = {
            ENTRY_FIELDS[0]: with_loss,
            ENTRY_FIELDS[1]: draw(st.integers(0, tokens - with_loss)),
        }
    return ShardEntry(
        file=f"{split}-{number:05d}-00000.zst",
        split=split,
        tokens=tokens,
        documents=draw(st.integers(1, tokens)),
        text_bytes=draw(COUNTS),
        file_bytes=draw(st.integers(1, INT64_MAX)),
        file_sha256=draw(SHA256),
        content_sha256=draw(SHA256),
        **of_examples,
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    row_tokens = draw(st.sampled_from([None, 64, 256]))
    vocab_size = draw(st.integers(2, 1 << 16))
    text_format = TextFormat(
        draw(st.sampled_from(Direction)), draw(st.sampled_from(Unit)), draw(SHA256)
    )
    return Manifest(
        text_format=text_format,
        vocab_size=vocab_size,
        begin_id=draw(st.integers(0, vocab_size - 1)),
        end_id=draw(st.integers(0, vocab_size - 1)),
        id_bytes=draw(st.sampled_from([2, 4])),
        frame_tokens=256,
        source=draw(st.sampled_from(["pydocs", "a folder, 2 x another", ""])),
        val_fraction=draw(st.floats(0, 0.99)),
        excluded=draw(st.dictionaries(st.sampled_from(["empty", "length"]), COUNTS)),
        shards=tuple(
            draw(entries(row_tokens, number)) for number in range(draw(st.integers(0, 4)))
        ),
        dictionary_sha256=draw(st.none() | SHA256),
        row_tokens=row_tokens,
        requested_val_fraction=draw(st.none() | st.floats(0, 0.99)),
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Written to by every example."""
    return tmp_path_factory.mktemp("shards")


@given(manifest=manifests())
def test_a_saved_manifest_loads_equal(folder: Path, manifest: Manifest) -> None:
    manifest.save(folder)
    assert Manifest.load(folder) == manifest


@given(manifest=manifests())
def test_a_total_is_the_sum_over_the_shards_of_a_split(manifest: Manifest) -> None:
    for split in SPLITS:
        total = manifest.total(split)
        mine = [entry for entry in manifest.shards if entry.split == split]
        assert total.pop("shards") == len(mine) == len(manifest.split(split))
        assert total == {name: sum(getattr(entry, name) for entry in mine) for name in total}
    assert len(manifest.shards) == sum(len(manifest.split(split)) for split in SPLITS)


@given(manifest=manifests(), sha256=SHA256)
def test_the_fingerprint_is_that_of_the_contents_however_compressed(
    manifest: Manifest, sha256: str
) -> None:
    smaller = tuple(
        replace(entry, file_bytes=1, file_sha256=sha256, text_bytes=0) for entry in manifest.shards
    )
    same = replace(manifest, shards=smaller, dictionary_sha256=sha256, source="another place")
    assert same.fingerprint == manifest.fingerprint
    others = [
        replace(manifest, frame_tokens=512),
        replace(manifest, row_tokens=128),
        replace(manifest, text_format=replace(manifest.text_format, tokenizer_sha256="f" * 65)),
        *(
            replace(manifest, shards=manifest.shards[:at] + manifest.shards[at + 1 :])
            for at in range(len(manifest.shards))
        ),
    ]
    assert manifest.fingerprint not in {other.fingerprint for other in others}


@given(manifest=manifests(), data=st.data())
def test_an_edited_entry_does_not_match_the_fingerprint(
    folder: Path, manifest: Manifest, data: st.DataObject
) -> None:
    if not manifest.shards:
        return
    manifest.save(folder)
    fields = json.loads((folder / MANIFEST_NAME).read_text())
    entry = data.draw(st.sampled_from(fields["shards"]))
    entry["content_sha256"] = entry["content_sha256"][::-1]
    (folder / MANIFEST_NAME).write_text(json.dumps(fields))
    if entry["content_sha256"] != entry["content_sha256"][::-1]:
        with pytest.raises(ShardCorruptError, match="its fingerprint is not that of its entries"):
            Manifest.load(folder)


def test_an_inconsistent_manifest_is_not_written(tmp_path: Path) -> None:
    text_format = TextFormat(Direction.BACKWARD, Unit.TOKEN, "5" * 64)
    twice = Manifest(
        text_format=text_format,
        vocab_size=600,
        begin_id=1,
        end_id=2,
        id_bytes=2,
        frame_tokens=256,
        source="pydocs",
        val_fraction=0.1,
        excluded={},
        shards=(ENTRY, ENTRY),
    )
    with pytest.raises(ShardCorruptError, match=r"it lists train-00000-00000\.zst 2 times"):
        twice.save(tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ShardsMissingError, match=r"no manifest\.json"):
        Manifest.load(tmp_path)


def test_a_shard_path_must_be_in_its_folder(tmp_path: Path) -> None:
    assert shard_path(tmp_path, ENTRY) == tmp_path / ENTRY.file
    with pytest.raises(ShardCorruptError):
        shard_path(tmp_path, replace(ENTRY, file="../train-00000-00000.zst"))
