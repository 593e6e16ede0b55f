"""De-duplication, limits and weights agree with a plain Python reference."""

import hashlib
import random
import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from data_pipeline.build import selection, val_minimum
from data_pipeline.build.task_input import belongs_to_val
from data_pipeline.errors import SourceEmptyError
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.verify import verify_data_set
from data_pipeline.sources.weighted import WeightedSource
from data_pipeline.text.codec import TextCodec
from tests.helpers.builds import Codecs, Run, build_here, documents_of, make_settings, write_records

VAL_FRACTION = 0.2

few_examples = hypothesis_settings(max_examples=25)

_WORDS = ["a ship", "the sea", "\U0001f600", "rain", "no one\n\nspoke"]
texts = st.integers(0, 39).map(lambda number: f"{_WORDS[number % 5]} {'and more ' * number}")
sources = st.lists(
    st.lists(st.lists(texts, max_size=8), min_size=1, max_size=4), min_size=1, max_size=2
).filter(lambda found: all(any(files) for files in found))
"""Sources of files of texts, of which many are equal."""
weights = st.sampled_from([0.3, 0.5, 1.0, 1.5, 2.0, 2.7])
limits = st.none() | st.integers(1, 60)


@dataclass(frozen=True)
class Cut:
    """Parameters of a build that must not affect the kept documents."""

    num_tasks: int | None
    workers: int


cuts = st.builds(Cut, st.none() | st.integers(1, 9), st.integers(1, 3))


def kept(
    found: list[list[list[str]]],
    codec: TextCodec,
    cut: Cut,
    weights: list[float] | None = None,
    **changed: object,
) -> dict[str, list[str]]:
    """The documents of each split of a real build, from the shards, which are verified."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        parts = []
        for number, files in enumerate(found):
            for index, file in enumerate(files):
                records = [{"text": text} for text in file]
                write_records(folder / f"source{number}" / f"{index}.jsonl", records)
            weight = weights[number] if weights else 1.0
            parts.append(WeightedSource(str(folder / f"source{number}"), weight))
        settings = make_settings(
            "",
            codec,
            **{"val_fraction": VAL_FRACTION, "frame_tokens": 64, "shard_tokens": 200, **changed},
        )
        settings = type(settings)(**{**vars(settings), "sources": tuple(parts)})
        # The val set's minimum, which `plainly` does not model, has its own tests.
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(val_minimum, "MIN_VAL_DOCUMENTS", 0)
            try:
                build_here(settings, codec, folder / "shards", cut.workers, cut.num_tasks)
            except SourceEmptyError:
                return {"train": [], "val": []}
        verify_data_set(folder / "shards")
        return documents_of(folder / "shards")


def plainly(
    found: list[list[list[str]]],
    codec: TextCodec,
    weights: list[float] | None = None,
    deduplicate: bool = False,
    limit_documents: int | None = None,
    limit_tokens: int | None = None,
) -> dict[str, list[str]]:
    """Reference implementation, without tasks, notes or shards."""
    taken = []
    for number, files in enumerate(found):
        weight = weights[number] if weights else 1.0
        for pass_number in range(1000):
            fraction = weight - pass_number
            if fraction <= 0:
                break
            taken += [
                (pass_number, text)
                for file in files
                for text in file
                if fraction >= 1 or _share(text) < fraction
            ]
    if deduplicate:
        taken = list(dict.fromkeys(taken))
    if limit_documents is not None:
        taken = taken[:limit_documents]
    if limit_tokens is not None:
        left = limit_tokens
        for number, (_, text) in enumerate(taken):
            left -= len(codec.encode_document(text))
            if left < 0:
                taken = taken[:number]
                break
    splits: dict[str, list[str]] = {"train": [], "val": []}
    for _, text in taken:
        is_val = belongs_to_val(hashlib.sha256(text.encode()).digest(), VAL_FRACTION)
        splits["val" if is_val else "train"].append(text)
    return splits if splits["train"] else {"train": [], "val": []}


def _share(text: str) -> float:
    """Hash of a text in [0, 1), independent of the one that decides its split."""
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[8:16], "big") / 2**64


@few_examples
@given(found=sources, cut=cuts)
def test_the_first_of_equal_documents_is_kept(
    found: list[list[list[str]]], cut: Cut, codec: Codecs
) -> None:
    expected = plainly(found, codec(), deduplicate=True)
    assert kept(found, codec(), cut, deduplicate=True) == expected


@few_examples
@given(found=sources, cut=cuts, limit=st.integers(1, 40))
def test_a_limit_of_documents_keeps_the_first_ones(
    found: list[list[list[str]]], cut: Cut, limit: int, codec: Codecs
) -> None:
    expected = plainly(found, codec(), limit_documents=limit)
    assert kept(found, codec(), cut, limit_documents=limit) == expected


@few_examples
@given(found=sources, cut=cuts, limit=st.integers(1, 2000))
def test_a_limit_of_tokens_keeps_the_most_documents_that_fit(
    found: list[list[list[str]]], cut: Cut, limit: int, codec: Codecs
) -> None:
    expected = plainly(found, codec(), limit_tokens=limit)
    assert kept(found, codec(), cut, limit_tokens=limit) == expected


@few_examples
@given(found=sources, cut=cuts, of_sources=st.tuples(weights, weights))
def test_weights_repeat_documents_as_often_as_given(
    found: list[list[list[str]]], cut: Cut, of_sources: tuple[float, float], codec: Codecs
) -> None:
    assert kept(found, codec(), cut, [*of_sources]) == plainly(found, codec(), [*of_sources])


@hypothesis_settings(max_examples=60)
@given(
    found=sources,
    cut=cuts,
    of_sources=st.tuples(weights, weights),
    deduplicate=st.booleans(),
    limit_documents=limits,
    limit_tokens=st.none() | st.integers(1, 3000),
)
def test_any_combination_of_options_agrees_with_the_reference(
    found: list[list[list[str]]],
    cut: Cut,
    of_sources: tuple[float, float],
    deduplicate: bool,
    limit_documents: int | None,
    limit_tokens: int | None,
    codec: Codecs,
) -> None:
    choices = {
        "deduplicate": deduplicate,
        "limit_documents": limit_documents,
        "limit_tokens": limit_tokens,
    }
    expected = plainly(found, codec(), [*of_sources], **choices)
    assert kept(found, codec(), cut, [*of_sources], **choices) == expected


@few_examples
@given(found=sources, at_a_time=st.integers(1, 20))
def test_comparing_few_documents_at_once_finds_the_same_duplicates(
    found: list[list[list[str]]], at_a_time: int, codec: Codecs
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(selection, "_PASS_DOCUMENTS", at_a_time)
        some = kept(found, codec(), Cut(3, 1), deduplicate=True)
    assert some == plainly(found, codec(), deduplicate=True)


MANY = [f"document {number} of many" for number in range(300)]


def of_weight(weight: float, codec: TextCodec, documents: list[str]) -> Counter[str]:
    found = kept([[documents]], codec, Cut(None, 1), [weight])
    return Counter(found["train"] + found["val"])


def test_a_weight_of_two_takes_everything_twice(codec: Codecs) -> None:
    assert of_weight(2.0, codec(), MANY) == Counter(MANY * 2)


def test_a_weight_of_a_half_takes_about_half(codec: Codecs) -> None:
    assert 110 < of_weight(0.5, codec(), MANY).total() < 190  # 4.6 standard deviations


def test_which_half_is_taken_depends_on_the_texts_alone(codec: Codecs) -> None:
    shuffled = random.Random(3).sample(MANY, len(MANY))
    assert of_weight(0.5, codec(), shuffled) == of_weight(0.5, codec(), MANY)


def test_a_weight_of_one_and_a_half_takes_everything_and_the_same_half_again(
    codec: Codecs,
) -> None:
    half = of_weight(0.5, codec(), MANY)
    assert of_weight(1.5, codec(), MANY) == Counter(MANY) + half


def test_deduplication_keeps_the_repeats_of_a_weight(codec: Codecs) -> None:
    found = kept([[MANY[:20] * 2]], codec(), Cut(2, 1), [2.0], deduplicate=True)
    assert Counter(found["train"] + found["val"]) == Counter(MANY[:20] * 2)


def test_duplicates_are_counted(codec: Codecs, tmp_path: Path) -> None:
    source = write_records(tmp_path / "s.jsonl", [{"text": text} for text in MANY[:20] * 3])
    settings = make_settings(source, codec(), deduplicate=True)
    manifest = build_here(settings, codec(), tmp_path / "shards")
    assert manifest.excluded == {"duplicate": 40}


def test_duplicates_past_the_limit_are_not_counted(codec: Codecs, tmp_path: Path) -> None:
    texts = [*MANY[:10], *MANY[:5], *MANY[10:30], *MANY[:30]]
    source = write_records(tmp_path / "s.jsonl", [{"text": text} for text in texts])
    settings = make_settings(source, codec(), deduplicate=True, limit_documents=15)
    manifest = build_here(settings, codec(), tmp_path / "shards")
    assert manifest.excluded == {"duplicate": 5}


def test_a_limit_below_the_first_document_is_refused(codec: Codecs, tmp_path: Path) -> None:
    source = write_records(tmp_path / "s.jsonl", [{"text": MANY[0]}])
    settings = make_settings(source, codec(), limit_tokens=1)
    with pytest.raises(SourceEmptyError, match="no text to train on"):
        build_here(settings, codec(), tmp_path / "shards")


def test_a_limit_skips_later_tasks(codec: Codecs, tmp_path: Path) -> None:
    for number in range(5):
        records = [{"text": text} for text in MANY[number * 20 : number * 20 + 20]]
        write_records(tmp_path / "source" / f"{number}.jsonl", records)
    settings = make_settings(tmp_path / "source", codec(), limit_documents=30)
    build_here(settings, codec(), tmp_path / "shards", num_tasks=5)
    records = sorted(path.name for path in (tmp_path / "shards" / ".build").glob("task-*"))
    assert records[:2] == ["task-00000.json", "task-00001.json"]
    assert len(records) < 5


def test_staged_files_are_removed_at_the_end(codec: Codecs, tmp_path: Path) -> None:
    source = write_records(tmp_path / "s.jsonl", [{"text": text} for text in MANY])
    settings = make_settings(source, codec(), deduplicate=True)
    build_here(settings, codec(), tmp_path / "shards")
    assert not (tmp_path / "shards" / ".build" / "staged").exists()


def test_a_selection_is_verified_by_the_command(
    codec: Codecs, tmp_path: Path, run_megaback: Run
) -> None:
    source = write_records(tmp_path / "s.jsonl", [{"text": text} for text in MANY * 2])
    settings = make_settings(source, codec(), deduplicate=True, limit_documents=150)
    build_here(settings, codec(), tmp_path / "shards")
    result = run_megaback("shards", "verify", tmp_path / "shards")
    assert result.returncode == 0, result.stderr
    totals = [Manifest.load(tmp_path / "shards").total(split) for split in ("train", "val")]
    assert sum(total["documents"] for total in totals) == 150
