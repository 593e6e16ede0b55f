"""Sources on the Hugging Face hub, with a server that implements the used part of its API."""

import hashlib
import io
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.helpers.hub_server import COMMIT, Answering, serving

NOT_THERE = {"X-Error-Code": "EntryNotFound"}
READ = """
import json, sys
from dataclasses import asdict
from data_pipeline.sources import parquet as parquet_source
from data_pipeline.sources.registry import Columns, list_slices, read_slice

parquet_source.SLICE_BYTES = 1
columns = Columns(language="language")
found = []
for source in sys.argv[1:]:
    slices = list_slices(source, columns)
    documents = [asdict(found) for piece in slices for found in read_slice(piece, columns)]
    found.append([[asdict(piece) for piece in slices], documents])
print(json.dumps([found, "torch" in sys.modules]))
"""


@dataclass
class Hub:
    """A data set `org/set` with these files."""

    files: dict[str, bytes]
    requests: list[str]
    address: str = ""


def parquet_bytes(name: str) -> bytes:
    texts = [f"{name}{row}" for row in range(4)]
    buffer = io.BytesIO()
    table = pa.table({"id": list(range(4)), "text": texts, "language": ["en"] * 4})
    pq.write_table(table, buffer, row_group_size=2)
    return buffer.getvalue()


@pytest.fixture
def hub() -> Iterator[Hub]:
    config = {"config_name": "all", "default": True, "data_files": "data/*.parquet"}
    card = f"---\nconfigs: {json.dumps([config])}\n---\n".encode()
    files = {f"data/{name}.parquet": parquet_bytes(name) for name in "ab"}
    state = Hub({**files, "README.md": card}, [])

    def entry(name: str) -> dict[str, Any]:
        data = state.files[name]
        lfs = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
        blob = hashlib.sha256(b"blob" + data).hexdigest()[:40]
        return {"type": "file", "path": name, "size": len(data), "oid": blob, "lfs": lfs}

    def tree(folder: str, is_recursive: bool) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for name in state.files:
            if name.startswith(folder):
                top, slash, _ = name.removeprefix(folder).partition("/")
                if slash:
                    path = folder + top
                    entries[path] = {"type": "directory", "path": path, "oid": "d" * 40, "size": 0}
                if is_recursive or not slash:
                    entries[name] = entry(name)
        return list(entries.values())

    class Handler(Answering):
        def do_GET(self) -> None:  # noqa: N802 - as http.server names it
            path = unquote(urlsplit(self.path).path)
            state.requests.append(f"{self.command} {path} {self.headers.get('Range')}")
            if match := re.fullmatch(r"/datasets/org/set/resolve/\w+/(.+)", path):
                self._give(match[1])
            elif re.fullmatch(r"/api/datasets/org/set(/revision/\w+)?", path):
                siblings = [{"rfilename": name} for name in state.files]
                self.answer_json({"id": "org/set", "sha": COMMIT, "siblings": siblings})
            elif match := re.fullmatch(r"/api/datasets/org/set/tree/\w+(?:/(.*))?", path):
                folder = f"{match[1]}/" if match[1] else ""
                self.answer_json(tree(folder, "recursive=true" in self.path.lower()))
            else:
                self.answer(404, b"{}", NOT_THERE)

        do_HEAD = do_GET

        def _give(self, name: str) -> None:
            headers = {"X-Repo-Commit": COMMIT, "Accept-Ranges": "bytes"}
            data = state.files.get(name)
            if data is None:
                self.answer(404, b"", headers | NOT_THERE)
                return
            headers["ETag"] = f'"{hashlib.sha256(data).hexdigest()}"'
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range") or "")
            if match is None:
                self.answer(200, data, headers)
            else:
                start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
                headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
                self.answer(206, data[start:stop], headers)

    with serving(Handler) as state.address:
        yield state


def test_a_data_set_on_the_hub_is_read_as_files_of_one_commit(hub: Hub, tmp_path: Path) -> None:
    sources = ["hf:org/set", "hf://datasets/org/set/data", "hf://datasets/org/set/data/*.parquet"]
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    result = subprocess.run(
        [sys.executable, "-c", READ, *sources],
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    (by_name, by_folder, by_pattern), has_torch = json.loads(result.stdout)
    assert by_name == by_folder == by_pattern
    slices, documents = by_name
    root = f"hf://datasets/org/set@{COMMIT}/data"
    assert [(piece["path"], piece["start"]) for piece in slices] == [
        (f"{root}/{name}.parquet", start) for name in "ab" for start in (0, 1)
    ]
    assert [document["text"] for document in documents] == [
        f"{name}{row}" for name in "ab" for row in range(4)
    ]
    assert {document["language"] for document in documents} == {"en"}
    assert not has_torch
    assert not [request for request in hub.requests if ".parquet None" in request]


@pytest.mark.parametrize("named", ["../../other/set/a.parquet", "hf://datasets/other/a.parquet"])
def test_a_readme_on_the_hub_cannot_name_files_of_others(
    hub: Hub, tmp_path: Path, named: str
) -> None:
    configs = [
        {"config_name": "all", "default": True, "data_files": "data/*.parquet"},
        {"config_name": "other", "data_files": [named, f"{hub.address}/elsewhere.parquet"]},
    ]
    hub.files["README.md"] = f"---\nconfigs: {json.dumps(configs)}\n---\n".encode()
    environment = {**os.environ, "HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path)}
    environment.pop("HF_HUB_OFFLINE", None)
    result = subprocess.run(
        [sys.executable, "-c", READ, "hf:org/set:other"],
        capture_output=True,
        text=True,
        timeout=60,
        env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
        check=False,
    )
    assert f"line 2 of its README.md names '{named}' under 'data_files'" in result.stderr
    asked = [request.split()[1] for request in hub.requests]
    assert any(path.endswith("README.md") for path in asked)
    assert not [path for path in asked if path.endswith(".parquet")]
