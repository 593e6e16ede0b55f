"""The data set of a build: every document once, in one split, byte for byte."""

import hashlib
import shutil
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.build.command import build_shards
from data_pipeline.build.task_input import belongs_to_val
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import SPLITS, Manifest
from data_pipeline.text.codec import Direction, Unit
from tests.helpers.builds import EMPTY_DOCUMENTS, Codecs, Run, make_settings, write_source
from tests.helpers.paths import SHARED
from tests.helpers.stored import document_ids

pytestmark = pytest.mark.usefixtures("a_task_a_file")

PROSE = SHARED / "corpora" / "prose" / "train-00003.parquet"


def rendered(folder: Path) -> dict[str, Counter[str]]:
    """The texts of every split, from the shards alone."""
    codec = DataSet.open(folder).codec()
    return {
        split: Counter(map(codec.render, document_ids(DataSet.open(folder), split)))
        for split in SPLITS
    }


def test_a_build_writes_several_shards_of_several_tasks(finished: Path) -> None:
    """Precondition of the other build tests."""
    names = [shard.file for shard in Manifest.load(finished).split("train")]
    assert {f"train-{task:05d}-{shard:05d}.zst" for task in range(6) for shard in (0, 1)} <= {
        *names
    }


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("unit", list(Unit))
@pytest.mark.parametrize("direction", list(Direction))
def test_every_document_is_rendered_byte_for_byte(
    source: Path,
    source_texts: list[str],
    codec: Codecs,
    tmp_path: Path,
    direction: Direction,
    unit: Unit,
) -> None:
    chosen = codec(direction, unit)
    build_shards(make_settings(source, chosen), chosen, tmp_path / "shards", workers=1)
    found = rendered(tmp_path / "shards")
    assert found["train"] + found["val"] == Counter(text for text in source_texts if text)


@pytest.mark.usefixtures("in_threads")
def test_text_files_are_documents_too(codec: Codecs, tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.mkdir()
    texts = ["one\r\n\r\nfile", "another \u2581 file\n"]
    for number, text in enumerate(texts):
        (source / f"{number}.txt").write_bytes(text.encode())
    settings = make_settings(source, codec(), val_fraction=0.0)
    build_shards(settings, codec(), tmp_path / "shards", workers=1)
    assert rendered(tmp_path / "shards")["train"] == Counter(texts)


def test_the_manifests_totals_are_those_of_the_documents(
    finished: Path, source_texts: list[str], codec: Codecs
) -> None:
    manifest = Manifest.load(finished)
    for split in SPLITS:
        of_split = [
            text
            for text in source_texts
            if text and is_val(text.encode("utf-8", "surrogatepass"), 0.1) == (split == "val")
        ]
        total = manifest.total(split)
        assert {name: total[name] for name in ("documents", "tokens", "text_bytes")} == {
            "documents": len(of_split),
            "tokens": sum(len(codec().encode_document(text)) for text in of_split),
            "text_bytes": sum(len(text.encode("utf-8", "surrogatepass")) for text in of_split),
        }


def test_empty_documents_are_excluded_and_counted(finished: Path) -> None:
    assert Manifest.load(finished).excluded == {"empty": EMPTY_DOCUMENTS}


def test_the_same_text_is_never_in_both_splits(finished: Path) -> None:
    found = rendered(finished)
    assert found["val"]
    assert not set(found["train"]) & set(found["val"])


def is_val(text: bytes, val_fraction: float) -> bool:
    return belongs_to_val(hashlib.sha256(text).digest(), val_fraction)


@given(text=st.binary(), smaller=st.floats(0, 1), larger=st.floats(0, 1))
def test_a_larger_val_set_holds_the_smaller_one(text: bytes, smaller: float, larger: float) -> None:
    smaller, larger = sorted((smaller, larger))
    assert is_val(text, larger) >= is_val(text, smaller)


def test_the_val_set_has_about_its_fraction_of_the_documents() -> None:
    chosen = sum(is_val(b"%d" % number, 0.1) for number in range(10_000))
    assert 880 < chosen < 1120  # four standard deviations


@pytest.mark.usefixtures("in_threads")
@pytest.mark.parametrize("changed", [{"compression_level": 9}, {}], ids=["level", "place"])
def test_compression_and_location_of_sources_do_not_change_the_fingerprint(
    source: Path, codec: Codecs, finished: Path, tmp_path: Path, changed: dict[str, object]
) -> None:
    elsewhere = Path(shutil.copytree(source, tmp_path / "elsewhere"))
    settings = make_settings(elsewhere, codec(), **changed)
    manifest, _ = build_shards(settings, codec(), tmp_path / "shards", workers=1)
    assert manifest.fingerprint == Manifest.load(finished).fingerprint


@pytest.mark.usefixtures("in_threads")
def test_a_changed_document_changes_the_fingerprint(
    source_texts: list[str], codec: Codecs, finished: Path, tmp_path: Path
) -> None:
    changed = write_source(tmp_path / "source", ["something else", *source_texts[1:]])
    settings = make_settings(changed, codec())
    manifest, _ = build_shards(settings, codec(), tmp_path / "shards", workers=1)
    assert manifest.fingerprint != Manifest.load(finished).fingerprint


def test_a_document_is_shown_byte_for_byte(
    finished: Path, run_megaback: Run, codec: Codecs
) -> None:
    texts = [codec().render(ids) for ids in document_ids(DataSet.open(finished), "val")]
    number = len(texts) - 1  # of the last shard
    result = run_megaback("shards", "inspect", finished, "--split", "val", "--document", number)
    assert result.stdout == texts[number]


@pytest.mark.skipif(not PROSE.exists(), reason="the prose corpus is not beside the repository")
def test_real_prose_is_built_verified_and_rendered_byte_for_byte(
    codec: Codecs, tmp_path: Path, run_megaback: Run
) -> None:
    import pyarrow.parquet

    out = tmp_path / "shards"
    build_shards(make_settings(PROSE, codec(), shard_tokens=1 << 20), codec(), out, workers=2)
    assert run_megaback("shards", "verify", out).returncode == 0
    found = rendered(out)
    texts = pyarrow.parquet.read_table(PROSE, columns=["text"])["text"].to_pylist()
    assert found["train"] + found["val"] == Counter(texts)
