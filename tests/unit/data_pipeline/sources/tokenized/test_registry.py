"""Tokenized sources: what is read of each kind of file, and what is refused."""

import json
import pickle
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_pipeline.errors import (
    BadRecordError,
    MegabackError,
    SourceEmptyError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.sources.tokenized import datatrove, megatron, streams
from data_pipeline.sources.tokenized.documents import DocumentChecker, TokenizedFormat
from data_pipeline.sources.tokenized.registry import list_tokenized, read_tokenized, train_and_val
from tests.helpers.builds import Codecs
from tests.helpers.files_of_writers import DOCUMENTS, END_ID, write_files
from tests.helpers.tokenized_files import (
    FORMATS,
    Markers,
    array_value,
    write_datatrove,
    write_flat,
    write_llmc,
    write_mds,
    write_mds_arrays,
    write_mds_rows,
    write_megatron,
)

Read = Callable[..., list[list[int]]]


@pytest.fixture(scope="module")
def documents(codec: Codecs) -> list[list[int]]:
    generator = random.Random(7)
    ids = np.flatnonzero(codec().piece_num_bytes()).tolist()
    return [generator.choices(ids, k=generator.randint(1, 40)) for _ in range(60)]


@pytest.fixture(scope="module")
def markers(codec: Codecs) -> Markers:
    return Markers(codec().begin_id, codec().end_id)


@pytest.fixture
def read(codec: Codecs, markers: Markers) -> Read:
    """The ids of the documents of a source; the first malformed one is raised."""

    def read_all(source: Path | str, max_bytes: int = 1 << 20, **how: Any) -> list[list[int]]:
        form = TokenizedFormat(**{"end_id": markers.end_id, "begin_id": markers.begin_id, **how})
        checker = DocumentChecker(form, codec(), max_bytes)
        found = []
        for piece in list_tokenized(str(source), form).slices:
            for document in read_tokenized(piece, form, checker, _raise, max_bytes):
                assert document.tokenized is not None
                found.append(document.tokenized.ids.tolist())
        return found

    return read_all


def _raise(error: BadRecordError) -> None:
    raise error


def refused(read: Read, source: Path | str, *named: str, **how: Any) -> MegabackError:
    with pytest.raises((BadRecordError, SourceUnreadableError)) as caught:
        read(source, **how)
    for each in named:
        assert each in str(caught.value)
    return caught.value


@pytest.mark.parametrize("name", FORMATS)
def test_every_document_is_read_in_order_wherever_slices_end(
    name: str,
    tmp_path: Path,
    documents: list[list[int]],
    markers: Markers,
    read: Read,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    source, how = FORMATS[name](tmp_path, documents, markers)
    once = [each for each in read(source, **how) if each]
    assert once == documents
    monkeypatch.setattr(streams, "SLICE_BYTES", 256)
    monkeypatch.setattr(streams, "_CHUNK_TOKENS", 50)
    monkeypatch.setattr(megatron, "SLICE_DOCUMENTS", 7)
    monkeypatch.setattr(datatrove, "SLICE_DOCUMENTS", 7)
    form = TokenizedFormat(end_id=markers.end_id, begin_id=markers.begin_id, **how)
    assert len(list_tokenized(str(source), form).slices) > (3 if name == "mds rows" else 0)
    assert [each for each in read(source, **how) if each] == documents


def test_files_that_megatron_and_mosaicml_streaming_wrote_are_read(
    tmp_path: Path, read: Read
) -> None:
    write_files(tmp_path)
    for name in ("m.bin", "m", "arrays", "any"):
        assert read(tmp_path / name, end_id=END_ID) == DOCUMENTS
    assert read(tmp_path / "rows", end_id=END_ID, joined=True) == DOCUMENTS
    assert read(tmp_path / "fixed", end_id=END_ID, joined=True) == [*DOCUMENTS[:2], [500, 301]]
    ended = [[[*ids[:2], END_ID][:2], [*ids, END_ID][2:]] for ids in DOCUMENTS]
    ours = write_megatron(tmp_path / "ours.bin", ended, "<u2", 8)
    for suffix in (".bin", ".idx"):
        of_megatron = (tmp_path / "m").with_suffix(suffix).read_bytes()
        assert ours.with_suffix(suffix).read_bytes() == of_megatron


def test_files_that_datatrove_writes_are_read(
    tmp_path: Path, documents: list[list[int]], markers: Markers, read: Read
) -> None:
    from datatrove.pipeline.tokens.tokenizer import TokenizedFile

    ended = [[*ids, markers.end_id] for ids in documents]
    for size, dtype in ((2, "<u2"), (4, "<u4")):
        folder = tmp_path / f"ds-{size}"
        file = TokenizedFile(str(folder), "0_tokens.ds", save_final_metadata=True, token_size=size)
        for ids in ended:
            file.write(ids, None)
        file.close()
        shuffled = file.copy("0", np.random.default_rng(0).permutation(len(ended)))
        assert read(folder / "0_tokens.ds") == documents
        assert sorted(read(folder / shuffled.filename)) == sorted(documents)
        (tmp_path / f"ours-{size}").mkdir()
        ours = write_datatrove(tmp_path / f"ours-{size}" / "0_tokens.ds", ended, dtype)
        for name in ("0_tokens.ds", "0_tokens.ds.index"):
            assert (folder / name).read_bytes() == ours.with_name(name).read_bytes()


def test_ids_of_llama_3_and_a_numpy_array_are_read(
    tmp_path: Path, documents: list[list[int]], markers: Markers, read: Read
) -> None:
    assert read(write_llmc(tmp_path / "a.bin", documents, markers.end_id, version=7)) == documents
    flat = write_flat(tmp_path / "b.bin", documents, markers.end_id, "<u4")
    assert read(flat, flat_type="uint32") == documents
    assert "`id_type` uint32" in str(refused(read, flat, "every second id is 0"))


def test_the_last_document_needs_no_end(
    tmp_path: Path, documents: list[list[int]], markers: Markers, read: Read
) -> None:
    path = write_flat(tmp_path / "a.bin", documents, markers.end_id)
    path.write_bytes(path.read_bytes()[:-2])
    assert read(path) == documents
    whole = write_flat(tmp_path / "b.bin", [documents[0]], markers.end_id)
    whole.write_bytes(whole.read_bytes()[:-2])  # as nanoGPT's Shakespeare
    assert read(whole) == [documents[0]]


def test_other_markers_are_named(tmp_path: Path, documents: list[list[int]], read: Read) -> None:
    """A source whose end id is not `<|endoftext|>`."""
    path = write_flat(tmp_path / "a.bin", documents, 0)
    refused(read, path, "has no text", "set `end_id` to 0")
    assert read(path, end_id=0) == documents
    begun = write_flat(tmp_path / "b.bin", [[3, *ids] for ids in documents], 0)
    assert read(begun, end_id=0, begin_id=3) == documents


def test_a_file_of_ids_that_is_cut_is_refused(
    tmp_path: Path, documents: list[list[int]], markers: Markers, read: Read
) -> None:
    flat = write_flat(tmp_path / "a.bin", documents, markers.end_id)
    flat.write_bytes(flat.read_bytes()[:-1])
    refused(read, flat, str(flat), "cut within the last one")
    llmc = write_llmc(tmp_path / "b.bin", documents, markers.end_id)
    llmc.write_bytes(llmc.read_bytes()[:-4])
    refused(read, llmc, str(llmc), "its header has")
    array = tmp_path / "c.npy"
    np.save(array, np.arange(9, dtype="<u2"))
    array.write_bytes(array.read_bytes()[:-2])
    refused(read, array, "its header has 9 ids")
    np.save(array, np.zeros((3, 3)))
    refused(read, array, "is not that of a sequence of ids")
    np.save(array, np.array([{"a": 1}], dtype=object), allow_pickle=True)
    refused(read, array, "is not that of a sequence of ids")


def test_damaged_files_of_megatron_are_refused(
    tmp_path: Path, documents: list[list[int]], markers: Markers, read: Read
) -> None:
    sequences = [[[*ids, markers.end_id]] for ids in documents]
    path = write_megatron(tmp_path / "a.bin", sequences)
    index = path.with_suffix(".idx")
    good_bin, good_index = path.read_bytes(), index.read_bytes()
    firsts_at = len(good_index) - 8 * (len(documents) + 1)
    changes: dict[str, tuple[bytes, bytes]] = {
        "does not begin with MMIDIDX": (good_bin, b"X" + good_index[1:]),
        "version 2": (good_bin, good_index[:9] + b"\2" + good_index[10:]),
        "type 77": (good_bin, good_index[:17] + bytes([77]) + good_index[18:]),
        "float64, not ids": (good_bin, good_index[:17] + bytes([6]) + good_index[18:]),
        "mode per sequence": (good_bin, good_index + bytes(len(documents))),
        "take": (good_bin, good_index[:-4]),
        "end before the sequences": (good_bin[:-4], good_index),
        "end at byte": (good_bin + bytes(4), good_index),
        "are not in order": (
            good_bin,
            good_index[:firsts_at] + bytes(8) * 3 + b"\xff" * 8 + good_index[firsts_at + 32 :],
        ),
    }
    for named, (data, head) in changes.items():
        path.write_bytes(data)
        index.write_bytes(head)
        refused(read, path, named)
    path.write_bytes(good_bin)
    index.unlink()
    refused(read, path, "every second id is 0")


def test_an_end_id_within_a_document_is_refused(
    tmp_path: Path, documents: list[list[int]], markers: Markers, read: Read
) -> None:
    joined = [[[*documents[0], markers.end_id, *documents[1]]]]
    path = write_megatron(tmp_path / "a.bin", joined)
    refused(read, path, "document 0", f"at its token {len(documents[0])}")


def test_damaged_files_of_datatrove_are_refused(
    tmp_path: Path, documents: list[list[int]], read: Read
) -> None:
    path = write_datatrove(tmp_path / "a.ds", documents)
    index = path.with_name("a.ds.index")
    data, ends = path.read_bytes(), index.read_bytes()
    path.write_bytes(data[:-2])
    refused(read, path, "are not the")
    path.write_bytes(data)
    index.write_bytes(ends[:-3])
    refused(read, path, "cut within a number")
    index.write_bytes(ends[8:16] + ends[:8] + ends[16:])
    refused(read, path, "not in order")
    index.write_bytes(ends)
    loss = path.with_name("a.ds.loss")
    loss.write_bytes(bytes([1]) * (len(data) // 2))
    assert read(path) == documents
    loss.write_bytes(bytes([1]) * (len(data) // 2 - 1) + b"\0")
    refused(read, path, f"document {len(documents) - 1}", "no loss on its token")
    loss.write_bytes(b"\1")
    refused(read, path, "no mask of")


def test_datatrove_without_an_index_is_a_stream(
    tmp_path: Path, documents: list[list[int]], markers: Markers, read: Read
) -> None:
    path = write_flat(tmp_path / "a.ds", documents, markers.end_id)
    assert read(path) == documents


def test_a_column_of_text_of_mds_is_text(tmp_path: Path, codec: Codecs, markers: Markers) -> None:
    texts = ["the cat", "sat.", ""]
    samples = [{"text": text.encode(), "n": bytes(8)} for text in texts]
    write_mds(tmp_path, samples, {"text": ("str", None), "n": ("int", 8)}, compression="zstd")
    form = TokenizedFormat(markers.end_id, markers.begin_id, column="text")
    (piece,) = list_tokenized(str(tmp_path), form).slices
    checker = DocumentChecker(form, codec(), 100)
    assert [each.text for each in read_tokenized(piece, form, checker, _raise, 100)] == texts


def test_mds_that_cannot_be_read_is_refused(
    tmp_path: Path, documents: list[list[int]], read: Read
) -> None:
    arrays = [array_value(ids) for ids in documents]

    def written(
        name: str, samples: Sequence[dict[str, bytes]], **columns: tuple[str, int | None]
    ) -> Path:
        return write_mds(tmp_path / name, samples, columns)

    pickled = [{"tokens": pickle.dumps([1])}]
    refused(read, written("pkl", pickled, tokens=("pkl", None)), "'pkl'", "never read")
    refused(read, written("png", pickled, tokens=("png", None)), "neither ids nor text")
    renamed = written("other", [{"ids": v} for v in arrays], ids=("ndarray:int32", None))
    refused(read, renamed, "no column 'tokens'", "'ids' (ndarray:int32)", "`column`")
    masked = [{"tokens": v, "loss_mask": v} for v in arrays]
    both = {"tokens": ("ndarray:int32", None), "loss_mask": ("ndarray:int32", None)}
    refused(read, write_mds(tmp_path / "mask", masked, both), "'loss_mask' is a mask")
    rows = [{"tokens": array_value([5] * 16)}] * 4
    refused(
        read,
        written("rows", rows, tokens=("ndarray:int32", None)),
        "cannot be distinguished",
        "`joined`",
    )
    refused(
        read, written("no ends", rows, tokens=("ndarray:int32", None)), "is in none", joined=True
    )
    two_axes = [{"tokens": bytes([2 << 2, 1, 1]) + bytes(4)}]
    refused(read, written("axes", two_axes, tokens=("ndarray:int32", None)), "one dimension")
    odd = [{"tokens": bytes(12)}]
    refused(read, written("odd", odd, tokens=("bytes", None)), "no whole number of int64 ids")


@pytest.mark.parametrize("compression", [None, "zstd"])
def test_damaged_mds_is_refused(
    compression: str | None, tmp_path: Path, documents: list[list[int]], read: Read
) -> None:
    folder = write_mds_arrays(tmp_path / "mds", documents, compression=compression)
    (shard,) = folder.glob("*.mds*")
    index = folder / "index.json"
    data, fields = shard.read_bytes(), json.loads(index.read_text())
    for changed in (data[:-1], data[:-1] + bytes([data[-1] ^ 1]), data[:6], data[: len(data) // 2]):
        shard.write_bytes(changed)
        refused(read, folder, str(shard))
    shard.write_bytes(data)
    of_shard = fields["shards"][0]
    key = "raw_data" if compression is None else "zip_data"
    for wrong in (
        {"format": "json"},
        {"column_encodings": []},
        {"column_sizes": [-1]},
        {"samples": 10**12},
        {"samples": -1},
        {key: {**of_shard[key], "basename": "../../etc/passwd"}},
        {key: {**of_shard[key], "basename": "/etc/passwd"}},
    ):
        index.write_text(json.dumps({"version": 2, "shards": [{**of_shard, **wrong}]}))
        refused(read, folder, str(index))
    for text in ("[]", "{", '{"version": 3, "shards": []}'):
        index.write_text(text)
        refused(read, folder, str(index))
    zipped = {**of_shard, "compression": "br:11", "zip_data": of_shard["raw_data"]}
    index.write_text(json.dumps({"version": 2, "shards": [zipped]}))
    refused(read, folder, "'br'", "zstd, gz, bz2")
    huge = {**of_shard, "raw_data": {**of_shard["raw_data"], "bytes": 1 << 40}}
    index.write_text(json.dumps({"version": 2, "shards": [huge]}))
    refused(read, folder, "size_limit")


def test_joined_rows_of_merged_folders_are_a_stream_per_folder(
    tmp_path: Path, documents: list[list[int]], markers: Markers, read: Read
) -> None:
    """llm-foundry's processes each write a folder, and drop the rest of a row at its end."""
    halves = documents[:30], documents[30:]
    shards = []
    for name, half in zip(("0", "1"), halves, strict=True):
        folder = write_mds_rows(tmp_path / name, half, markers.end_id, row=16)
        for shard in json.loads((folder / "index.json").read_text())["shards"]:
            shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
            shards.append(shard)
        (folder / "index.json").unlink()
    (tmp_path / "index.json").write_text(json.dumps({"version": 2, "shards": shards}))
    assert [each for each in read(tmp_path, joined=True) if each] == documents


def test_a_source_that_changes_after_listing_is_refused(
    tmp_path: Path, documents: list[list[int]], markers: Markers, codec: Codecs
) -> None:
    for name, write in FORMATS.items():
        (tmp_path / name).mkdir()
        source, how = write(tmp_path / name, documents, markers)
        form = TokenizedFormat(markers.end_id, markers.begin_id, **how)
        piece = list_tokenized(str(source), form).slices[0]
        changed = next(
            path
            for path in sorted((tmp_path / name).iterdir())
            if path.suffix in (".bin", ".npy", ".ds", ".mds", ".zstd")
        )
        data = changed.read_bytes()
        changed.write_bytes(data[:-8] + bytes([data[-8] ^ 1]) + data[-7:])
        checker = DocumentChecker(form, codec(), 1 << 20)
        with pytest.raises(SourceUnreadableError, match="changed since it was listed"):
            list(read_tokenized(piece, form, checker, _raise, 1 << 20))


def test_a_source_that_is_no_file_is_refused(tmp_path: Path, read: Read) -> None:
    with pytest.raises(SourceMissingError, match="no file matches"):
        read(tmp_path / "none.bin")
    with pytest.raises(SourceUnreadableError, match="fetch them first"):
        read("https://example.org/train.bin")
    (tmp_path / "empty.bin").touch()
    with pytest.raises(SourceEmptyError):
        read(tmp_path / "empty.bin")


def test_a_folder_of_train_and_val_is_two_sources(tmp_path: Path) -> None:
    assert train_and_val(str(tmp_path)) is None
    for name in ("train.bin", "val.bin", "meta.pkl", "prepare.py"):
        (tmp_path / name).touch()
    assert train_and_val(str(tmp_path)) == (str(tmp_path / "*train*"), str(tmp_path / "*val*"))
    (tmp_path / "other.bin").touch()
    assert train_and_val(str(tmp_path)) is None
