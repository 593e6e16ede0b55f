"""Files of data sets that claim more than there is: one sentence at once, and no memory for it."""

import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from data_set_helpers import publish
from remote_helpers import FileServer
from shard_parts import ShardParts, compressed_zeros

from data_pipeline import inspection, recompress, verify
from data_pipeline.build_options import echo_manifest
from data_pipeline.data_set import DataSet
from data_pipeline.errors import MegabackError, ShardCorruptError, TokenizerError
from data_pipeline.frame_store import FrameStore
from data_pipeline.manifest import DICTIONARY_NAME, MANIFEST_NAME, TOKENIZER_NAME, Manifest
from data_pipeline.plan import Plan
from data_pipeline.seekable import SeekEntry

MAX_BYTES = 256 << 20
SHARD = "train-00002-00000.zst"


@contextmanager
def within_bounds(max_bytes: int = MAX_BYTES) -> Iterator[None]:
    """See that what is done takes neither a second nor much memory."""
    tracemalloc.start()
    started = time.process_time()
    try:
        yield
        assert time.process_time() - started < 1
        assert tracemalloc.get_traced_memory()[1] < max_bytes
    finally:
        tracemalloc.stop()


def refused(folder: Path, code: int = ShardCorruptError.exit_code) -> str:
    """What the commands that read a data set say of it: one sentence, each with this exit code."""
    said = ""
    out = folder.with_name("recompressed")
    for command, arguments in (
        (inspection.main, []),
        (verify.main, []),
        (recompress.main, ["--out", str(out)]),
    ):
        with within_bounds():
            result = CliRunner().invoke(command, [str(folder), *arguments, "--workers", "1"])
        assert result.exit_code == code, (result.output, result.exception)
        assert len(result.stderr) < 1000
        said += result.stderr
        assert not (out / SHARD).exists()
    return said


MANIFESTS: dict[str, Callable[[dict[str, Any]], object]] = {
    **{
        f"{key} {value!r:.20}": lambda fields, key=key, value=value: fields.update({key: value})
        for key, values in {
            "frame_tokens": [1 << 25, 0, -1, True, "256", 2.5, None, [256], 10**4000],
            "vocab_size": [0, -600, 70_000, 1 << 33, True, "600"],
            "id_bytes": [0, 1, 3, 8, -2, True, "2"],
            "begin_id": [-1, 1 << 40, "1"],
            "end_id": [600_000, None],
            "val_fraction": [1.5, -0.1, "0.1", True, None],
            "asked_val_fraction": ["0.1", 7],
            "source": [7, None, ["a"]],
            "left_out": [[], {"empty": -1}, {"empty": "1"}, {"empty": 10**30}, 7],
            "skipped": [[], {"files": []}, {"files": {"a": {"count": "1", "first": []}}}, 7],
            "dictionary_sha256": ["../../x", 7, "A" * 64],
            "tokenizer_sha256": ["5", None, "../" * 30],
            "direction": ["sideways", 7, None, "x" * 10_000_000],
            "unit": [["token"]],
            "fingerprint": [7, "0" * 64],
            "version": [2, 3, "1", [1], None],
            "format": ["megaback", {}],
            "shards": [{}, 7, "train", [7], [[]], [{}], [None]],
        }.items()
        for value in values
    },
    **{
        f"shard's {key} {value!r:.20}": lambda fields, key=key, value=value: fields["shards"][
            0
        ].update({key: value})
        for key, values in {
            "tokens": [0, -1, 1 << 41, True, "1", 1.0, None, 10**4000],
            "documents": [0, -5, 1 << 60, "1"],
            "text_bytes": [-1, 1 << 63, "1"],
            "file_bytes": [-1, 0, 1 << 63, 10**40],
            "file_sha256": ["../../../../../etc", 7, "", "g" * 64],
            "content_sha256": [None, "0" * 63],
            "learnt_tokens": [1 << 40, -1],
            "padding_tokens": [-1, "0"],
            "another": [1],
        }.items()
        for value in values
    },
    **{
        f"no {key}": lambda fields, key=key: fields.pop(key)
        for key in ("shards", "format", "vocab_size", "left_out", "fingerprint")
    },
    "no file": lambda fields: fields["shards"][0].pop("file"),
}


@pytest.mark.parametrize("hostile", MANIFESTS)
def test_a_manifest_with_impossible_fields_is_one_sentence(copy: Path, hostile: str) -> None:
    fields = json.loads((copy / MANIFEST_NAME).read_text())
    MANIFESTS[hostile](fields)
    (copy / MANIFEST_NAME).write_text(json.dumps(fields))
    with within_bounds(), pytest.raises(ShardCorruptError) as caught:
        Manifest.load(copy)
    assert "is not a manifest of this version (" in str(caught.value)
    assert len(str(caught.value)) < 600 + len(str(copy))


MANIFEST_TEXTS = {
    "nothing": b"",
    "not text": b"\xff\xfe\x00",
    "a list": b"[]",
    "a number": b"7",
    "a string": b'"manifest"',
    "null": b"null",
    "nesting": b"[" * 3_000_000,
    "objects": b'{"a":' * 1_000_000,
    "digits": b'{"version": ' + b"9" * 3_000_000 + b"}",
    "lists": b"[" + b"[]," * 10_000_000 + b"[]]",
    "shards": b'{"shards": [' + b"{}," * 10_000_000 + b"{}]}",
    "infinity": b'{"version": Infinity}',
    "half": b'{"format": "megaback-sh',
}


@pytest.mark.parametrize("text", MANIFEST_TEXTS)
def test_a_manifest_that_is_none_is_refused_at_once(copy: Path, text: str) -> None:
    (copy / MANIFEST_NAME).write_bytes(MANIFEST_TEXTS[text])
    refused(copy)


@pytest.mark.parametrize(
    ("name", "code"), [(MANIFEST_NAME, 31), (TOKENIZER_NAME, 24), (DICTIONARY_NAME, 31)]
)
def test_a_file_of_a_terabyte_is_not_read(copy: Path, name: str, code: int) -> None:
    if name == DICTIONARY_NAME:
        fields = json.loads((copy / MANIFEST_NAME).read_text())
        fields["dictionary_sha256"] = "5" * 64
        (copy / MANIFEST_NAME).write_text(json.dumps(fields))
    with (copy / name).open("ab") as file:
        file.truncate(1 << 40)
    for folder in (copy, f"file://{copy}"):
        with within_bounds(), pytest.raises(MegabackError, match="more than") as caught:
            open_all(folder)
        assert caught.value.exit_code == code


def open_all(folder: Path | str) -> None:
    data_set = DataSet.open(folder)
    data_set.open_shard(data_set.manifest.shards[0])
    data_set.codec()


def test_a_tokenizer_of_too_many_pieces_is_refused() -> None:
    from sentencepiece import sentencepiece_model_pb2

    from data_pipeline.text import Direction, TextCodec, Unit

    model = sentencepiece_model_pb2.ModelProto()
    model.trainer_spec.model_type = 2
    for number in range(50):
        model.pieces.add(piece=f"p{number}", score=0.0, type=2 if number == 0 else 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data_pipeline.text.MAX_VOCABULARY", 49)
        with pytest.raises(TokenizerError, match="50 pieces, more than the 49"):
            TextCodec(model.SerializeToString(), Direction.BACKWARD, Unit.TOKEN)


def change_shard(folder: Path, change: Callable[[ShardParts], object]) -> None:
    """Change a shard, and make the manifest agree with its size."""
    path = folder / SHARD
    parts = ShardParts.of(path.read_bytes())
    replaced = change(parts)
    path.write_bytes(replaced if isinstance(replaced, bytes) else parts.joined())
    agree(folder)


def agree(folder: Path, **changed: object) -> None:
    fields = json.loads((folder / MANIFEST_NAME).read_text())
    (entry,) = (entry for entry in fields["shards"] if entry["file"] == SHARD)
    entry.update(file_bytes=max((folder / SHARD).stat().st_size, 1), **changed)
    (folder / MANIFEST_NAME).write_text(json.dumps(fields))


def set_header(**changed: object) -> Callable[[ShardParts], object]:
    return lambda parts: parts.header.update(changed)


def table(num_entries: int, entries: bytes = b"") -> bytes:
    content = entries + struct.pack("<IBI", num_entries, 0x80, 0x8F92EAB1)
    return struct.pack("<II", 0x184D2A5E, len(content)) + content


def many_documents(parts: ShardParts) -> None:
    """A hundred frames of 2**24 ids and 2**30 documents, in a file of some kilobytes."""
    parts.header.update(frame_tokens=1 << 24, tokens=100 << 24, documents=1 << 30)
    parts.entries = [SeekEntry(0, 2 << 24, 0)] * 99 + [SeekEntry(len(parts.frames), 2 << 24, 0)]
    parts.counts = compressed_zeros(1 << 26)


def empty_documents(parts: ShardParts) -> None:
    documents = parts.header["tokens"]
    parts.header.update(documents=documents)
    parts.counts = compressed_zeros(4 * documents)


def giant_frame(parts: ShardParts) -> None:
    """A frame whose own head promises 2**50 bytes."""
    head = struct.pack("<IBQ", 0xFD2FB528, 0b11100100, 1 << 50)
    parts.frames = head + parts.frames[len(head) :]


def unknown_size(parts: ShardParts) -> None:
    compressor = zstd_without_size()
    raw = bytes(parts.entries[0].decompressed_bytes)
    first = compressor.compress(raw)
    parts.frames = first + parts.frames[parts.entries[0].compressed_bytes :]
    parts.entries[0] = SeekEntry(len(first), len(raw), struct.unpack("<I", first[-4:])[0])


def zstd_without_size() -> Any:
    import zstandard

    return zstandard.ZstdCompressor(write_content_size=False, write_checksum=True)


def two_frames_in_one(parts: ShardParts) -> None:
    first = parts.entries[0]
    more = compressed_zeros(1 << 20)
    stop = first.compressed_bytes
    parts.frames = parts.frames[:stop] + more + parts.frames[stop:]
    parts.entries[0] = SeekEntry(stop + len(more), *first[1:])


def large_ids(parts: ShardParts) -> None:
    import zstandard

    raw = b"\xff" * parts.entries[0].decompressed_bytes
    first = zstandard.ZstdCompressor(write_checksum=True).compress(raw)
    parts.frames = first + parts.frames[parts.entries[0].compressed_bytes :]
    parts.entries[0] = SeekEntry(len(first), len(raw), struct.unpack("<I", first[-4:])[0])


SHARDS: dict[str, Callable[[ShardParts], object]] = {
    **{
        f"{key} {value!r:.20}": set_header(**{key: value})
        for key, values in {
            "tokens": [0, -1, 1 << 62, True, "7", None, 7.0, [7], 10**4000],
            "documents": [-1, 1 << 62, True, "7", 10**4000],
            "frame_tokens": [0, -64, 1 << 25, 1 << 62, True, "64"],
            "id_bytes": [0, 1, 3, 4, 8, -2, True, 1 << 62],
            "text_bytes": [-1, 1 << 63, "7"],
            "row_tokens": [0, -1, 64, 1 << 62, True, "64"],
            "version": [0, 2, True, "1", 10**4000],
            "direction": ["forward", 7, "x" * 30_000],
            "tokenizer_sha256": ["0" * 64, None],
            "dictionary_sha256": ["0" * 64, 7],
            "another": [1],
        }.items()
        for value in values
    },
    "no tokens": lambda parts: parts.header.pop("tokens"),
    "a header of a list": lambda parts: setattr(parts, "header_json", b"[]"),
    "a header of brackets": lambda parts: setattr(parts, "header_json", b"[" * 60_000),
    "a header of megabytes": lambda parts: setattr(parts, "header_json", b" " * (8 << 20)),
    "a header that is no text": lambda parts: setattr(parts, "header_json", b"\xff" * 50),
    "many documents": many_documents,
    "documents without tokens": empty_documents,
    "no counts": lambda parts: setattr(parts, "counts", b""),
    "more counts": lambda parts: setattr(parts, "counts", compressed_zeros(1 << 30)),
    "counts and a tail": lambda parts: setattr(parts, "counts", parts.counts + bytes(100_000)),
    "a giant frame": giant_frame,
    "a frame of unknown size": unknown_size,
    "two frames in one": two_frames_in_one,
    "ids past the vocabulary": large_ids,
    "four billion entries": lambda parts: setattr(parts, "seek_table", table((1 << 32) - 1)),
    "no entries": lambda parts: setattr(parts, "seek_table", table(0)),
    "entries past the end": lambda parts: parts.more_entries.append(
        SeekEntry((1 << 32) - 1, (1 << 32) - 1, 0)
    ),
    "frames of gigabytes": lambda parts: setattr(
        parts, "entries", [SeekEntry(*entry[:1], (1 << 32) - 2, 0) for entry in parts.entries]
    ),
    "nothing": lambda _: b"",
    "a table alone": lambda _: table(1, struct.pack("<III", 0, 0, 0)),
}


@pytest.mark.parametrize("hostile", SHARDS)
def test_a_shard_that_claims_what_is_not_is_one_sentence(copy: Path, hostile: str) -> None:
    change_shard(copy, SHARDS[hostile])
    assert SHARD in refused(copy)
    manifest = Manifest.load(copy)
    store = FrameStore(DataSet.open(copy), "train")
    (first,) = (
        sum(-(-entry.tokens // manifest.frame_tokens) for entry in manifest.shards[:number])
        for number, entry in enumerate(manifest.shards)
        if entry.file == SHARD
    )
    with within_bounds(), suppress(ShardCorruptError):
        store.frame(first)


def sparse(path: Path, head: bytes, size_bytes: int, tail: bytes) -> None:
    with path.open("wb") as file:
        file.write(head)
        file.truncate(size_bytes - len(tail))
        file.seek(0, os.SEEK_END)
        file.write(tail)


@pytest.mark.parametrize("num_entries", [1 << 20, (1 << 22) + 1, (1 << 22) + 2, (1 << 32) - 1])
def test_a_sparse_file_with_room_for_its_claims_is_refused_at_once(
    copy: Path, num_entries: int
) -> None:
    """Zeros cost a stranger nothing, so a file may be as large as what it claims."""
    footer = struct.pack("<IBI", num_entries, 0x80, 0x8F92EAB1)
    table_bytes = 8 + 12 * num_entries + 9
    start = 1000
    with (copy / SHARD).open("wb") as file:
        file.truncate(start)
        file.seek(start)
        file.write(struct.pack("<II", 0x184D2A5E, (table_bytes - 8) & 0xFFFFFFFF))
        file.truncate(start + table_bytes - 9)
        file.seek(0, os.SEEK_END)
        file.write(footer)
    agree(copy)
    assert SHARD in refused(copy)


def test_a_sparse_index_and_frame_of_gigabytes_are_not_read(copy: Path) -> None:
    parts = ShardParts.of((copy / SHARD).read_bytes())
    header = json.dumps(parts.header).encode()
    for frame_bytes, index_bytes, header_bytes in (
        (len(parts.frames), 3 << 30, 2 << 30),
        (len(parts.frames), 3 << 30, len(header)),
        (3 << 30, 8 + 12 + len(header) + len(parts.counts), len(header)),
    ):
        index = struct.pack("<II8sI", 0x184D2A5D, index_bytes - 8, b"MEGABACK", header_bytes)
        entries = [*parts.entries[:-1], SeekEntry(0, *parts.entries[-1][1:])]
        before = sum(entry.compressed_bytes for entry in entries)
        entries[-1] = SeekEntry(frame_bytes - before, *entries[-1][1:])
        packed = b"".join(struct.pack("<III", *entry) for entry in entries)
        tail = table(len(entries) + 1, packed + struct.pack("<III", index_bytes, 0, 0x51D8E999))
        with (copy / SHARD).open("wb") as file:
            file.truncate(frame_bytes)
            file.seek(frame_bytes)
            file.write(index + header + parts.counts)
            file.truncate(frame_bytes + index_bytes)
            file.seek(0, os.SEEK_END)
            file.write(tail)
        agree(copy)
        assert SHARD in refused(copy)


def test_a_document_that_is_too_long_to_be_shown_is_told(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inspection, "_MAX_DOCUMENT_TOKENS", 3)
    result = CliRunner().invoke(inspection.main, [str(copy), "--document", "0"])
    assert result.exit_code == 10
    assert "more than the 3 that are shown" in result.stderr


PLANS: dict[str, Callable[[dict[str, Any]], object]] = {
    "portions": lambda plan: plan.update(task_portions=[1 << 62]),
    "negative portions": lambda plan: plan.update(
        task_portions=[-1, sum(plan["task_portions"]) + 1]
    ),
    "a weight": lambda plan: plan["settings"]["sources"][0].update(weight=1e308),
    "a weight of a thousand": lambda plan: (
        plan["settings"]["sources"][0].update(weight=1000.0),
        plan.update(
            inputs=[[{**plan["inputs"][0][0], "slices": [[0, 1, 1]] * 20_000}]],
            task_portions=[20_000_000],
        ),
    ),
    "a shard's size": lambda plan: plan["settings"].update(shard_tokens="7"),
    "a level": lambda plan: plan["settings"].update(compression_level=99),
    "a frame": lambda plan: plan["settings"].update(frame_tokens=1 << 30),
    "a column": lambda plan: plan["settings"].update(text_column=["text"]),
    "a direction": lambda plan: plan["settings"].update(direction="sideways"),
    "a split": lambda plan: plan["settings"]["sources"][0].update(split="../x"),
    "a slice": lambda plan: plan["inputs"][0][0].update(slices=[[0, 1]]),
    "a slice's number": lambda plan: plan["inputs"][0][0].update(slices=[[0, 1, "7"]]),
    "a path": lambda plan: plan["inputs"][0][0].update(path=7),
    "inputs": lambda plan: plan.update(inputs=7),
    "more inputs": lambda plan: plan.update(inputs=plan["inputs"] * 2),
    "tasks": lambda plan: plan.update(asked_tasks="7"),
    "causes": lambda plan: plan.update(skipped=[7]),
    "a version": lambda plan: plan.update(version=[1] * 1000),
}


@pytest.mark.parametrize("hostile", PLANS)
def test_a_plan_with_impossible_fields_is_one_sentence(copy: Path, hostile: str) -> None:
    fields = json.loads((copy / "plan.json").read_text())
    PLANS[hostile](fields)
    (copy / "plan.json").write_text(json.dumps(fields))
    with within_bounds(), pytest.raises(MegabackError) as caught:
        Plan.load(copy)
    assert caught.value.exit_code == 44
    assert len(str(caught.value)) < 600 + len(str(copy))


@pytest.mark.parametrize("text", MANIFEST_TEXTS)
def test_a_plan_that_is_none_is_refused_at_once(copy: Path, text: str) -> None:
    (copy / "plan.json").write_bytes(MANIFEST_TEXTS[text])
    with within_bounds(), pytest.raises(MegabackError):
        Plan.load(copy)


def test_what_a_build_wrote_is_read(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The other side of all of the above."""
    change_shard(copy, lambda _: None)
    assert CliRunner().invoke(inspection.main, [str(copy)]).exit_code == 0
    echo_manifest(Manifest.load(copy), copy)
    assert Plan.load(copy).num_tasks
    assert "documents" in capsys.readouterr().out


def test_a_server_that_sends_more_than_a_manifest_is_told(
    copy: Path, server: FileServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = publish(server, copy)
    DataSet.open(url)
    monkeypatch.setattr("data_pipeline.manifest.MAX_MANIFEST_BYTES", 1000)
    server.requests.clear()
    with pytest.raises(ShardCorruptError, match="it has more than 1,000 bytes"):
        DataSet.open(url)
    assert len(server.requests) == 1
