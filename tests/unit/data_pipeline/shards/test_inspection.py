"""`megaback shards inspect`: its figures agree with the documents."""

import json
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from click.testing import CliRunner, Result
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.shards import inspection
from data_pipeline.shards.data_set import DataSet as OpenDataSet
from data_pipeline.shards.document_lengths import DocumentLengths, describe, read_document_lengths
from data_pipeline.shards.inspection import document_at, main, sampled_entropy, unigram_entropy
from data_pipeline.shards.length_plot import draw_histogram
from data_pipeline.shards.manifest import Manifest, ShardEntry
from data_pipeline.shards.reader import ShardReader
from data_pipeline.shards.traversal import num_frames, spread_frames
from tests.helpers.batches import DataSet, data_set, document_shards
from tests.helpers.builds import Codecs
from tests.helpers.stored import document_ids

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"

some_lengths = st.lists(st.one_of(st.integers(2, 40), st.integers(2, 10**6)), min_size=1)


def inspect(*arguments: object) -> Result:
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, result.stderr
    return result


def as_array(lengths: list[int]) -> npt.NDArray[np.int64]:
    return np.array(lengths, dtype=np.int64)


@given(lengths=some_lengths, fraction=st.floats(0.01, 1.0))
def test_quantiles_are_those_of_the_lengths(lengths: list[int], fraction: float) -> None:
    expected = np.quantile(lengths, fraction, method="inverted_cdf")
    assert DocumentLengths.of(as_array(lengths)).quantile(fraction) == expected


@given(parts=st.lists(some_lengths, min_size=1, max_size=5))
def test_joined_lengths_are_those_of_all_documents(parts: list[list[int]]) -> None:
    joined = DocumentLengths.joined([DocumentLengths.of(as_array(part)) for part in parts])
    whole = [length for part in parts for length in part]
    assert np.repeat(joined.lengths, joined.documents).tolist() == sorted(whole)
    assert (joined.num_documents, joined.tokens) == (len(whole), sum(whole))


@given(lengths=some_lengths)
def test_every_document_is_in_the_bin_of_its_length(lengths: list[int]) -> None:
    bins = DocumentLengths.of(as_array(lengths)).bins()
    for piece in bins:
        inside = [length for length in lengths if piece.low <= length <= piece.high]
        assert (piece.documents, piece.tokens) == (len(inside), sum(inside))
        assert piece.low.bit_count() == 1
    assert sum(piece.documents for piece in bins) == len(lengths)
    assert [piece.low for piece in bins[1:]] == [piece.high + 1 for piece in bins[:-1]]
    assert bins[0].documents
    assert bins[-1].documents


@given(lengths=some_lengths)
def test_a_bar_is_drawn_for_every_bin_with_documents(lengths: list[int]) -> None:
    distribution = DocumentLengths.of(as_array(lengths))
    lines = describe(distribution)[2:]
    assert [line.endswith("%") for line in lines] == [
        piece.documents == 0 for piece in distribution.bins()
    ]


def test_a_data_set_without_documents_has_no_lengths() -> None:
    nothing = DocumentLengths.joined([])
    assert (nothing.bins(), nothing.to_dict(), describe(nothing)) == (
        [],
        {"bins": []},
        ["no documents"],
    )


def test_lengths_are_read_without_decoding_a_frame(
    small: DataSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = [len(ids) for ids in document_ids(small.opened, "train")]
    monkeypatch.delattr(ShardReader, "frame")
    lengths = read_document_lengths(small.opened, "train")
    assert np.repeat(lengths.lengths, lengths.documents).tolist() == sorted(expected)


@settings(max_examples=25)
@given(shards=document_shards(), data=st.data())
def test_a_document_is_found_by_its_number(
    shards: list[list[npt.NDArray[np.int64]]], data: st.DataObject
) -> None:
    documents = [document for of_shard in shards for document in of_shard]
    number = data.draw(st.integers(0, len(documents) - 1))
    with data_set(shards) as written:
        ids = document_at(written.opened, "train", number)
    assert ids.tolist() == documents[number].tolist()


def test_showing_a_document_by_number_opens_one_shard(
    finished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened = []
    open_shard = OpenDataSet.open_shard

    def noting(data_set: OpenDataSet, entry: ShardEntry) -> ShardReader:
        opened.append(entry)
        return open_shard(data_set, entry)

    monkeypatch.setattr(OpenDataSet, "open_shard", noting)
    inspect(finished, "--document", 150)
    assert len(opened) == 1


@settings(max_examples=25)
@given(shards=document_shards(), max_frames=st.integers(1, 12))
def test_sampled_frames_are_spread_evenly(
    shards: list[list[npt.NDArray[np.int64]]], max_frames: int
) -> None:
    with data_set(shards) as written:
        manifest = written.manifest
        first, total = {}, 0
        for entry in manifest.shards:
            first[entry.file] = total
            total += num_frames(manifest, entry)
        chosen = [
            first[entry.file] + frame
            for entry, frames in spread_frames(manifest, "train", max_frames)
            for frame in frames
        ]
    assert len(chosen) == min(max_frames, total)
    assert 0 <= chosen[0] <= chosen[-1] < total
    gaps = {after - before for before, after in pairwise(chosen)}
    assert gaps <= {total // len(chosen), -(-total // len(chosen))}


def test_the_entropy_of_all_frames_is_that_of_the_tokens(small: DataSet) -> None:
    ids = np.concatenate(list(document_ids(small.opened, "train")))
    counts = np.bincount(ids[ids != small.manifest.begin_id])
    share = counts[counts > 0] / counts.sum()
    expected = -(share * np.log(share)).sum()
    assert unigram_entropy(small.opened, "train") == pytest.approx(expected)


@pytest.mark.parametrize("workers", [1, 3])
def test_a_sampled_entropy_has_its_number_of_frames(small: DataSet, workers: int) -> None:
    entropy = sampled_entropy(small.opened, "train", 2, workers)
    assert (entropy.frames, entropy.of_frames) == (2, len(small.frames))
    ids = np.concatenate([small.frames[1], small.frames[4]])
    counts = np.bincount(ids[ids != small.manifest.begin_id])
    share = counts[counts > 0] / counts.sum()
    assert entropy.nats == pytest.approx(-(share * np.log(share)).sum())


def test_an_estimate_is_labeled_as_one(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "estimated" not in inspect(finished).stdout
    monkeypatch.setattr(inspection, "_MAX_FRAMES", 3)
    assert "estimated on 3 of" in inspect(finished).stdout


def test_json_has_the_totals_lengths_and_entropy_of_each_split(finished: Path) -> None:
    manifest = Manifest.load(finished)
    found = json.loads(inspect(finished, "--json").stdout)
    assert found["fingerprint"] == manifest.fingerprint
    for name in ("train", "val"):
        split = found["splits"][name]
        assert {key: split[key] for key in manifest.total(name)} == manifest.total(name)
        lengths = [len(ids) for ids in document_ids(OpenDataSet.open(finished), name)]
        of_split = split["document_tokens"]
        assert (of_split["min"], of_split["max"]) == (min(lengths), max(lengths))
        assert of_split["mean"] == pytest.approx(np.mean(lengths))
        assert sum(piece["documents"] for piece in of_split["bins"]) == len(lengths)
        nats = split["unigram_entropy"]["nats"]
        assert nats == pytest.approx(unigram_entropy(OpenDataSet.open(finished), name))


def test_a_document_is_shown_as_text_pieces_ids_and_json(finished: Path, codec: Codecs) -> None:
    ids = document_at(OpenDataSet.open(finished), "val", 3)
    text = codec().render(ids)
    pieces = [codec().piece(piece_id) for piece_id in ids.tolist()]
    arguments = (finished, "--split", "val", "--document", 3)
    assert inspect(*arguments).stdout == text
    assert inspect(*arguments, "--stored").stdout == " ".join(pieces) + "\n"
    assert inspect(*arguments, "--ids").stdout.split() == [str(piece_id) for piece_id in ids]
    assert json.loads(inspect(*arguments, "--json").stdout) == {
        "split": "val",
        "document": 3,
        "tokens": len(ids),
        "text": text,
        "ids": ids.tolist(),
        "pieces": pieces,
    }


@pytest.mark.parametrize(
    "arguments",
    [
        ["--stored"],
        ["--ids"],
        ["--document", "1", "--plot", "lengths.png"],
        ["--document", "100000"],
        ["--plot", "lengths.svg"],
    ],
    ids=" ".join,
)
def test_contradictory_options_are_refused(finished: Path, arguments: list[str]) -> None:
    result = CliRunner().invoke(main, [str(finished), *arguments])
    assert (result.exit_code, result.stderr.count("\n")) == (10, 1)


def test_a_picture_is_a_png(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "lengths.png"
    inspect(finished, "--plot", path)
    assert path.read_bytes().startswith(PNG_SIGNATURE)
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("lengths", [[2], [7, 7, 7], [2, 10**6]], ids=str)
def test_a_picture_can_be_drawn_of_few_documents(tmp_path: Path, lengths: list[int]) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "lengths.png"
    draw_histogram(DocumentLengths.of(as_array(lengths)), "few", path)
    assert path.read_bytes().startswith(PNG_SIGNATURE)


def test_without_matplotlib_a_picture_is_refused_before_anything_is_read(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setattr(inspection, "summarize", None)
    path = tmp_path / "lengths.png"
    result = CliRunner().invoke(main, [str(finished), "--plot", str(path)])
    assert (result.exit_code, path.exists()) == (12, False)
    assert "pip install" in result.stderr


def test_a_picture_that_cannot_be_written_is_one_error(finished: Path, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    path = tmp_path / "nowhere" / "lengths.png"
    result = CliRunner().invoke(main, [str(finished), "--plot", str(path)])
    assert (result.exit_code, result.stderr.count("\n")) == (74, 1)
