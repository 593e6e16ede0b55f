"""docs/formats.md against stored bytes: a reader written from that page, without our own code."""

import hashlib
import json
import re
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
import xxhash
import zstandard

from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import Manifest
from data_pipeline.shards.reader import ShardReader
from data_pipeline.sources.columns import ExampleColumns
from tests.helpers.builds import Codecs, build_here, make_settings, write_records
from tests.helpers.exports import write_checkpoint
from tests.helpers.paths import ROOT
from tests.helpers.stored import document_ids

_PAGE = ROOT / "docs" / "formats.md"
_TABLE_MAGIC, _INDEX_MAGIC, _SEEKABLE_MAGIC = 0x184D2A5E, 0x184D2A5D, 0x8F92EAB1
ROW_TOKENS = 64


@dataclass
class Shard:
    """Contents of a shard, as the page defines them."""

    header: dict[str, Any]
    raw: bytes
    """The ids."""
    counts: bytes

    @property
    def ids(self) -> list[int]:
        kind = {2: "H", 4: "I"}[self.header["id_bytes"]]
        return list(struct.unpack(f"<{len(self.raw) // self.header['id_bytes']}{kind}", self.raw))

    def documents(self) -> Iterator[list[int]]:
        ids, position = self.ids, 0
        for (tokens,) in struct.iter_unpack("<I", self.counts):
            yield ids[position : position + tokens]
            position += tokens


def low_half(content: bytes) -> int:
    return xxhash.xxh64(content).intdigest() & 0xFFFF_FFFF


def read_shard(path: Path) -> Shard:
    data = path.read_bytes()
    num_frames, descriptor, magic = struct.unpack("<IBI", data[-9:])
    assert (descriptor, magic) == (0x80, _SEEKABLE_MAGIC)
    table = data[-9 - 12 * num_frames : -9]
    table_head = struct.pack("<II", _TABLE_MAGIC, len(table) + 9)
    assert data[-9 - len(table) - 8 : -9 - len(table)] == table_head
    position, raw = 0, b""
    entries = list(struct.iter_unpack("<III", table))
    for number, (stored_bytes, content_bytes, checksum) in enumerate(entries):
        frame = data[position : position + stored_bytes]
        position += stored_bytes
        content = b""
        if number < len(entries) - 1:
            content = zstandard.ZstdDecompressor().decompress(frame)
            assert frame[-4:] == struct.pack("<I", checksum)
        assert (len(content), low_half(content)) == (content_bytes, checksum)
        raw += content
    assert position == len(data) - 9 - len(table) - 8
    magic, size, signature, header_bytes = struct.unpack("<II8sI", frame[:20])
    assert (magic, size, signature) == (_INDEX_MAGIC, len(frame) - 8, b"MEGABACK")
    header = json.loads(frame[20 : 20 + header_bytes])
    frame_tokens, id_bytes = header["frame_tokens"], header["id_bytes"]
    sizes = [content_bytes // id_bytes for _, content_bytes, _ in entries[:-1]]
    assert all(size == frame_tokens for size in sizes[:-1])
    assert sizes[-1] <= frame_tokens
    return Shard(header, raw, zstandard.ZstdDecompressor().decompress(frame[20 + header_bytes :]))


def require_documented(*stored: dict[str, Any]) -> None:
    """Check that the page names every key."""
    names = set(re.findall(r"`(\w+)`", _PAGE.read_text(encoding="utf-8")))
    for fields in stored:
        assert sorted(fields.keys() - names) == []


@pytest.fixture(scope="module")
def examples(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> Path:
    """A data set of instruction examples."""
    folder = tmp_path_factory.mktemp("examples")
    rows = [
        {"instruction": f"Count to {n}.", "output": "one two " * (n % 5) + "end"} for n in range(30)
    ]
    source = write_records(folder / "source" / "0.jsonl", rows)
    settings = make_settings(
        source.parent, codec(), examples=ExampleColumns(), row_tokens=ROW_TOKENS, frame_tokens=128
    )
    build_here(settings, codec(), folder / "shards")
    return folder / "shards"


def all_shards(folder: Path) -> Iterator[tuple[dict[str, Any], Shard]]:
    for entry in json.loads((folder / "manifest.json").read_text())["shards"]:
        yield entry, read_shard(folder / entry["file"])


@pytest.mark.parametrize("name", ["finished", "examples"])
def test_hashes_and_totals_are_those_that_the_page_defines(
    name: str, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(name)
    manifest = json.loads((folder / "manifest.json").read_text())
    contents = {
        key: manifest[key]
        for key in ("direction", "unit", "tokenizer_sha256", "frame_tokens", "row_tokens")
        if key in manifest
    }
    contents["shards"] = []
    for entry, shard in all_shards(folder):
        data = (folder / entry["file"]).read_bytes()
        assert entry["file_bytes"] == len(data)
        assert entry["file_sha256"] == hashlib.sha256(data).hexdigest()
        assert entry["content_sha256"] == hashlib.sha256(shard.raw + shard.counts).hexdigest()
        contents["shards"].append([entry["split"], entry["content_sha256"]])
        columns = 3 if "row_tokens" in shard.header else 1
        assert entry["documents"] == len(shard.counts) // 4 // columns
        assert entry["tokens"] == len(shard.ids)
        shared = shard.header.keys() & (entry.keys() | manifest.keys()) - {"version"}
        assert all(shard.header[key] == {**manifest, **entry}[key] for key in shared)
        assert manifest["version"] == shard.header["version"] + 2
        require_documented(shard.header, entry)
    written = json.dumps(contents, sort_keys=True).encode()
    assert manifest["fingerprint"] == hashlib.sha256(written).hexdigest()
    for split, totals in manifest["splits"].items():
        of_split = [entry for entry in manifest["shards"] if entry["split"] == split]
        assert totals.pop("shards") == len(of_split)
        assert totals == {key: sum(entry[key] for entry in of_split) for key in totals}
    require_documented(manifest, json.loads((folder / "plan.json").read_text()))
    require_documented(
        *(json.loads(path.read_text()) for path in folder.glob(".build/task-*.json"))
    )


def test_documents_and_their_split_are_those_that_the_page_defines(
    finished: Path, source_texts: list[str]
) -> None:
    manifest = json.loads((finished / "manifest.json").read_text())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(finished / "tokenizer.model"))
    found = []
    for entry, shard in all_shards(finished):
        for ids in shard.documents():
            assert (ids[0], ids[-1]) == (pieces.bos_id(), pieces.eos_id())
            assert (ids[0], ids[-1]) == (manifest["begin_id"], manifest["end_id"])
            spelled = b"".join(
                bytes([int(pieces.id_to_piece(i)[3:5], 16)])
                if pieces.is_byte(i)
                else pieces.id_to_piece(i).replace("\u2581", " ").encode()
                for i in ids[-2:0:-1]
            )
            fraction = int.from_bytes(hashlib.sha256(spelled).digest()[:8], "big") / 2**64
            assert entry["split"] == ("val" if fraction < manifest["val_fraction"] else "train")
            found.append(spelled)
    given = [text.encode("utf-8", "surrogatepass") for text in source_texts if text]
    assert sorted(found) == sorted(given)


def test_examples_are_stored_as_documented(examples: Path) -> None:
    manifest = json.loads((examples / "manifest.json").read_text())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(examples / "tokenizer.model"))
    assert (manifest["version"], manifest["row_tokens"]) == (4, ROW_TOKENS)
    number_of = pieces.piece_to_id
    num_examples = 0
    for entry, shard in all_shards(examples):
        ids, position, loss_tokens, padding = shard.ids, 0, 0, 0
        for tokens, num_given, num_loss_tokens in struct.iter_unpack("<III", shard.counts):
            one = ids[position : position + tokens]
            assert position // ROW_TOKENS == (position + tokens - 1) // ROW_TOKENS
            assert one[:2] == [number_of("<|im_start|>"), number_of("<|response|>")]
            assert one[num_given - 1] == number_of("<|instruction|>")
            assert one[num_given + num_loss_tokens - 1] == number_of("<|im_end|>")
            rest = one[num_given + num_loss_tokens :]
            assert rest == [pieces.eos_id()] * len(rest)
            instruction = pieces.decode(one[num_given : num_given + num_loss_tokens - 1][::-1])
            response = pieces.decode(one[2 : num_given - 3][::-1])
            assert re.fullmatch(r"Count to \d+\.", instruction)
            content = f"{instruction}\0{response}".encode()
            fraction = int.from_bytes(hashlib.sha256(content).digest()[:8], "big") / 2**64
            assert entry["split"] == ("val" if fraction < manifest["val_fraction"] else "train")
            position, loss_tokens, padding = (
                position + tokens,
                loss_tokens + num_loss_tokens,
                padding + len(rest),
            )
            num_examples += 1
        assert (entry["loss_tokens"], entry["padding_tokens"]) == (loss_tokens, padding)
    assert num_examples == 30


def test_a_shard_without_the_checksum_of_its_index_is_read(copy: Path) -> None:
    """Earlier versions wrote 0 in its place."""
    manifest = Manifest.load(copy)
    expected = [ids.tolist() for ids in document_ids(DataSet.open(copy), "train")]
    for entry in manifest.shards:
        path = copy / entry.file
        data = path.read_bytes()
        assert data[-13:-9] == struct.pack("<I", 0x51D8E999)
        path.write_bytes(data[:-13] + bytes(4) + data[-9:])
        ShardReader(path).close()
    assert [ids.tolist() for ids in document_ids(DataSet.open(copy), "train")] == expected


def test_the_stamp_of_a_file_is_the_one_that_the_page_defines(finished: Path) -> None:
    inputs = json.loads((finished / "plan.json").read_text())["inputs"]
    for source in inputs:
        for one in source:
            data = Path(one["path"]).read_bytes()
            stamped = b"%d:" % len(data) + data[: 1 << 16] + data[-(1 << 16) :]
            assert one["stamp"] == hashlib.sha256(stamped).hexdigest()


def test_a_checkpoint_is_complete_as_documented(tmp_path: Path, codec: Codecs) -> None:
    target, model = write_checkpoint(tmp_path / "run", codec())
    meta = json.loads((target / "meta.json").read_text())
    require_documented(meta)
    found: dict[str, dict[int, bytes]] = {}
    for name, (size, sha256) in meta["files"].items():
        data = (target / name).read_bytes()
        assert (size, sha256) == (len(data), hashlib.sha256(data).hexdigest())
        for key, content in read_tensors(data).items():
            kind, parameter, start = key.split(":")
            assert kind == "weight"
            found.setdefault(parameter, {})[int(start)] = content
    for name, weight in model.named_parameters():
        whole = b"".join(found[name][start] for start in sorted(found[name]))
        assert whole == weight.detach().numpy().tobytes()


def read_tensors(data: bytes) -> dict[str, bytes]:
    """Tensors of a safetensors file, as bytes."""
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    return {
        name: data[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]]
        for name, entry in header.items()
    }
