"""One data set at many addresses: a folder, and the URLs under which its files are published."""

import json
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import DICTIONARY_NAME, MANIFEST_NAME, Manifest
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from tests.helpers.file_server import FileServer

Frames = dict[str, list[list[int]]]

KINDS = ["folder", "file", "memory", "http"]


def published_files(folder: Path) -> dict[str, bytes]:
    """The files of a data set that readers need, by name."""
    names = [MANIFEST_NAME, TOKENIZER_NAME, DICTIONARY_NAME]
    paths = [*(folder / name for name in names), *folder.glob("*.zst")]
    return {path.name: path.read_bytes() for path in paths if path.is_file()}


def publish(server: FileServer, folder: Path, name: str = "shards") -> str:
    """Put a data set on a server. Returns its URL."""
    for file, data in published_files(folder).items():
        server.files[f"{name}/{file}"] = data
    return server.url(name)


class Place:
    """Location of a data set, with methods to change its files."""

    def __init__(self, kind: str, folder: Path, server: FileServer) -> None:
        self.kind = kind
        self._folder = folder
        self._server = server
        self._name = f"set-{uuid.uuid4().hex}"
        self.address = {
            "folder": str(folder),
            "file": f"file://{folder}",
            "memory": f"memory://{self._name}",
            "http": server.url(self._name),
        }[kind]
        for file, data in published_files(folder).items():
            self.write(file, data)

    def write(self, file: str, data: bytes) -> None:
        """Replace a file, in place if it is on disk."""
        if self.kind == "memory":
            _memory().pipe(f"/{self._name}/{file}", data)
        elif self.kind == "http":
            self._server.files[f"{self._name}/{file}"] = data
        else:
            (self._folder / file).write_bytes(data)

    def read(self, file: str) -> bytes:
        return (self._folder / file).read_bytes()

    def remove(self, file: str) -> None:
        if self.kind == "memory":
            _memory().rm(f"/{self._name}/{file}")
        elif self.kind == "http":
            del self._server.files[f"{self._name}/{file}"]
        else:
            (self._folder / file).unlink()

    def change(self, file: str, **fields: object) -> None:
        """Replace fields of a JSON file."""
        self.write(file, json.dumps({**json.loads(self.read(file)), **fields}).encode())


def _memory() -> Any:
    import fsspec

    return fsspec.filesystem("memory")


@contextmanager
def empty_memory() -> Iterator[None]:
    """Remove the files that are published to memory within the block."""
    yield
    _memory().store.clear()
    _memory().pseudo_dirs[:] = [""]


def stored_frames(folder: Path) -> Frames:
    """Every frame of every shard of a folder, in order."""
    manifest = Manifest.load(folder)
    frames = {}
    for entry in manifest.shards:
        with DataSet.open(folder).open_shard(entry) as reader:
            ids = reader.tokens(0, entry.tokens)
        starts = range(0, len(ids), manifest.frame_tokens)
        frames[entry.file] = [
            ids[start : start + manifest.frame_tokens].tolist() for start in starts
        ]
    return frames


def frames_of(data_set: DataSet) -> Frames:
    """Every frame of every shard of an open data set, in order."""
    frames = {}
    for entry in data_set.manifest.shards:
        reader = data_set.open_shard(entry)
        frames[entry.file] = [reader.frame(frame).tolist() for frame in range(reader.num_frames)]
    return frames


def with_flipped_bit(data: bytes, position: int) -> bytes:
    flipped = np.frombuffer(data, dtype=np.uint8).copy()
    flipped[position] ^= 16
    return flipped.tobytes()
