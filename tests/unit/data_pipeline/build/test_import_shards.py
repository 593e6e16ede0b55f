"""`megaback import shards`: what others have tokenized becomes the shards that its text gives."""

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from data_pipeline.build.command import main as build
from data_pipeline.build.import_shards import main
from data_pipeline.build.plan import Plan
from data_pipeline.build.settings import BuildSettings
from data_pipeline.errors import ConfigError, ShardCorruptError
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import SPLITS, Manifest
from data_pipeline.shards.verify import verify_data_set
from data_pipeline.sources.tokenized import streams
from data_pipeline.sources.tokenized.documents import TokenizedFormat
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.tokenizer.markers import with_markers
from tests.helpers.bpe import qwen_content
from tests.helpers.builds import (
    Codecs,
    build_here,
    building_in_threads,
    documents_of,
    hashes,
    write_records,
)
from tests.helpers.stored import document_ids
from tests.helpers.tokenized_files import FORMATS, Markers, write_flat

DIRECTIONS = list(Direction)


@pytest.fixture(scope="module")
def texts(english_documents: list[str]) -> list[str]:
    return english_documents[:120]


@pytest.fixture(scope="module")
def documents(codec: Codecs, texts: list[str]) -> list[list[int]]:
    forward = codec(Direction.FORWARD)
    return [forward.encode(text).tolist() for text in texts]


@pytest.fixture(scope="module")
def markers(codec: Codecs) -> Markers:
    return Markers(codec().begin_id, codec().end_id)


def settings_of(
    source: Path | str, codec: TextCodec, *, how: dict[str, Any] | None = None, **changed: Any
) -> BuildSettings:
    form = TokenizedFormat(codec.end_id, codec.begin_id, **(how or {}))
    values: dict[str, Any] = {
        "sources": (WeightedSource(str(source)),),
        "tokenizer_sha256": codec.format.tokenizer_sha256,
        "direction": codec.format.direction.value,
        "val_fraction": 0.2,
        "frame_tokens": 1024,
        "shard_tokens": 3000,
        "tokenized": form,
        **changed,
    }
    return BuildSettings(**values)


def ids_of(folder: Path) -> dict[str, list[list[int]]]:
    """The ids of each document in the order of the text."""
    data_set = DataSet.open(folder)
    codec = data_set.codec()
    return {
        split: [codec.ids_of(each).tolist() for each in document_ids(data_set, split)]
        for split in SPLITS
    }


def invoke(*words: object) -> Any:
    with building_in_threads():
        return CliRunner().invoke(main, list(map(str, words)), catch_exceptions=False)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_a_data_set_of_ids_is_that_of_its_texts(
    direction: Direction,
    tmp_path: Path,
    texts: list[str],
    documents: list[list[int]],
    markers: Markers,
    codec: Codecs,
) -> None:
    """Whichever program wrote the ids: the same shards and sets, with the ids as they are."""
    of_text = write_records(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    settings = settings_of(of_text, codec(direction), tokenized=None)
    expected = build_here(settings, codec(direction), tmp_path / "expected")
    for name, write in FORMATS.items():
        (tmp_path / name).mkdir()
        source, how = write(tmp_path / name, documents, markers)
        out = tmp_path / f"out-{name}"
        settings = settings_of(source, codec(direction), how=how)
        manifest = build_here(settings, codec(direction), out)
        assert manifest.fingerprint == expected.fingerprint, name
        assert manifest.shards == expected.shards
    found = ids_of(out)
    assert sorted(found["train"] + found["val"]) == sorted(documents)
    assert len(found["val"]) > 10
    verify_data_set(out)


def test_the_bytes_depend_on_neither_workers_nor_a_restart(
    tmp_path: Path,
    documents: list[list[int]],
    markers: Markers,
    codec: Codecs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(streams, "SLICE_BYTES", 1 << 11)
    source = write_flat(tmp_path / "train.bin", documents, markers.end_id)
    settings = settings_of(source, codec(), deduplicate=True)
    build_here(settings, codec(), tmp_path / "one", workers=1, num_tasks=5)
    build_here(settings, codec(), tmp_path / "three", workers=3, num_tasks=5)
    assert Plan.load(tmp_path / "one") == Plan.load(tmp_path / "three")
    assert Plan.load(tmp_path / "one").num_tasks == 5
    assert hashes(tmp_path / "three") == hashes(tmp_path / "one")
    (tmp_path / "three" / "manifest.json").unlink()
    (tmp_path / "three" / ".build" / "task-00002.json").unlink()
    with building_in_threads():
        result = CliRunner().invoke(build, ["--out", str(tmp_path / "three"), "--workers", "1"])
    assert result.exit_code == 0, result.output
    assert Manifest.load(tmp_path / "three").shards == Manifest.load(tmp_path / "one").shards


@pytest.mark.parametrize("where", ["ids", "order", "number"])
def test_shards_that_differ_from_their_source_are_never_finished(
    where: str,
    tmp_path: Path,
    documents: list[list[int]],
    markers: Markers,
    codec: Codecs,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A defect between source and shard: a changed id, exchanged ids, a document too few."""
    source = write_flat(tmp_path / "train.bin", documents, markers.end_id)
    right = TextCodec.document_of

    def wrong(self: TextCodec, ids: Any) -> Any:
        document = right(self, ids).copy()
        if where == "ids":
            document[1] = document[1] ^ 1
        elif where == "order":
            document[1:-1] = document[1:-1][::-1]
        else:
            document[-1] = document[0]
        return document

    monkeypatch.setattr(TextCodec, "document_of", wrong)
    out = tmp_path / "out"
    with pytest.raises(ShardCorruptError, match="is not what the source held"):
        build_here(settings_of(source, codec()), codec(), out)
    assert not (out / "manifest.json").exists()


def test_the_command_imports_a_folder_of_nanogpt_and_resumes(
    tmp_path: Path,
    documents: list[list[int]],
    texts: list[str],
    markers: Markers,
    tokenizer_path: Path,
) -> None:
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    write_flat(folder / "train.bin", documents[:100], markers.end_id)
    write_flat(folder / "val.bin", documents[100:], markers.end_id)
    out = tmp_path / "out"
    words = ["--source", folder, "--tokenizer", tokenizer_path, "--out", out, "--workers", 1]
    result = invoke(*words)
    assert result.exit_code == 0, result.output
    assert "train: 100 documents" in result.output
    assert "no source has more" not in result.output
    assert ids_of(out) == {"train": documents[:100], "val": documents[100:]}
    assert documents_of(out)["val"] == texts[100:]
    assert "were already done" in invoke(*words).output
    both = invoke(*words, "--val-source", folder / "val.bin")
    assert both.exit_code == 10
    assert "give its files of train" in both.output


def test_ids_without_an_end_id_are_one_document_with_a_note(
    tmp_path: Path, documents: list[list[int]], tokenizer_path: Path, markers: Markers
) -> None:
    source = write_flat(tmp_path / "a.bin", [documents[0] + documents[1]], markers.end_id)
    source.write_bytes(source.read_bytes()[:-2])
    result = invoke(
        "--source", source, "--tokenizer", tokenizer_path, "--out", tmp_path / "out", "--workers", 1
    )
    assert result.exit_code == 0, result.output
    assert f"more than one document; if id {markers.end_id} is not between" in result.output


def test_a_malformed_document_stops_the_import_or_is_counted(
    tmp_path: Path, documents: list[list[int]], markers: Markers, tokenizer_path: Path
) -> None:
    source = write_flat(tmp_path / "a.bin", [*documents[:30], [5, 60_000], []], markers.end_id)
    out = tmp_path / "out"
    words = ["--source", source, "--tokenizer", tokenizer_path, "--out", out, "--workers", 1]
    stopped = invoke(*words)
    assert stopped.exit_code == 23
    at = sum(map(len, documents[:30])) + 30
    assert f"{source}: document at token {at:,} (byte {2 * at:,}): id 60000" in stopped.output
    assert "--on-bad-record skip" in stopped.output
    assert not (out / "manifest.json").exists()
    skipped = invoke(*words, "--on-bad-record", "skip")
    assert skipped.exit_code == 0, skipped.output
    assert Manifest.load(out).excluded == {"bad_record": 1, "empty": 1}
    assert "id outside the vocabulary" in skipped.output


def test_limits_and_duplicates_are_those_of_a_build(
    tmp_path: Path, documents: list[list[int]], markers: Markers, codec: Codecs
) -> None:
    source = write_flat(tmp_path / "a.bin", documents[:20] * 3, markers.end_id)
    settings = settings_of(source, codec(), deduplicate=True, limit_documents=15)
    build_here(settings, codec(), tmp_path / "out")
    found = ids_of(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(documents[:15])


def test_reversal_of_words_needs_text(codec: Codecs, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="`unit` is 'word'"):
        settings_of(tmp_path, codec(Direction.BACKWARD, Unit.WORD), unit="word")


def test_plans_of_ids_with_a_format_out_of_range_are_damaged(
    tmp_path: Path, documents: list[list[int]], markers: Markers, codec: Codecs
) -> None:
    source = write_flat(tmp_path / "a.bin", documents, markers.end_id)
    settings = settings_of(source, codec())
    fields = settings.to_dict()
    assert BuildSettings.from_dict(json.loads(json.dumps(fields))) == settings
    for wrong in ({"end_id": -1}, {"end_id": "2"}, {"other": 1}, {"flat_type": "object"}):
        changed = {**fields, "tokenized": {**fields["tokenized"], **wrong}}
        with pytest.raises((ValueError, ConfigError)):
            BuildSettings.from_dict(changed)


def test_ids_of_a_character_that_is_cut_are_kept(
    tmp_path: Path, markers: Markers, codec: Codecs
) -> None:
    """Documents may begin and end within a character, as those of byte-level tokenizers do."""
    forward = codec(Direction.FORWARD)
    generator = random.Random(1)
    whole = forward.encode("\u4e2d\U0001f600\u2581").tolist()
    cut = [whole[1:-1], whole[2:], whole]
    cut += [generator.sample(whole, 3) for _ in range(17)]
    source = write_flat(tmp_path / "a.bin", cut, markers.end_id)
    build_here(settings_of(source, codec()), codec(), tmp_path / "out")
    found = ids_of(tmp_path / "out")
    assert sorted(found["train"] + found["val"]) == sorted(cut)
    assert np.concatenate(cut).max() < codec().vocab_size


def test_ids_of_another_models_tokenizer_json_are_those_of_its_texts(
    tmp_path: Path, texts: list[str]
) -> None:
    """Ids as `tokenizers` itself gives them, and the end id that its tokenizer has."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_str(qwen_content().decode())
    codec = TextCodec(with_markers(qwen_content()).content, Direction.BACKWARD, Unit.TOKEN)
    documents = [tokenizer.encode(text).ids for text in texts]
    end_id = tokenizer.token_to_id("<|endoftext|>")
    source = write_flat(tmp_path / "train.bin", documents, end_id)
    of_text = write_records(tmp_path / "texts.jsonl", [{"text": text} for text in texts])
    imported = build_here(settings_of(source, codec), codec, tmp_path / "imported")
    of_texts = settings_of(of_text, codec, tokenized=None)
    assert imported.shards == build_here(of_texts, codec, tmp_path / "built").shards
