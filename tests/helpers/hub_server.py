"""A server with the part of the Hugging Face hub's API that reads repositories of models."""

import hashlib
import json
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class ModelHub:
    """A repository `org/model` with the files of a folder, at one commit."""

    folder: Path
    address: str = ""
    asked: list[str] = field(default_factory=list)
    """Files that were fetched."""
    tokens: set[str] = field(default_factory=set)
    has_failed: bool = False
    """Whether each request gets an error (403)."""


def using_hub(hub: ModelHub, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Use a hub in place of the real one in this process, with a cache of its own."""
    from huggingface_hub import constants

    template = constants.HUGGINGFACE_CO_URL_TEMPLATE.removeprefix(constants.ENDPOINT)
    monkeypatch.setattr(constants, "ENDPOINT", hub.address)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.address + template)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)


class Answering(BaseHTTPRequestHandler):
    """A handler whose answers have a length, and no body where only the head is asked for."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def answer_json(self, value: object) -> None:
        self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002
        pass


@contextmanager
def serving(handler: type[Answering]) -> Iterator[str]:
    """The address of a server on loopback, until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def serving_model(folder: Path) -> Iterator[ModelHub]:
    """A hub with the folder as `org/model` of branch `main`, until the block ends."""
    hub = ModelHub(folder)

    class Handler(Answering):
        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.tokens.add(self.headers.get("Authorization", ""))
            revision = rf"(?:main|{COMMIT})"
            if hub.has_failed:
                self.answer(403, b"{}", {})
            elif found := re.fullmatch(rf"/org/model/resolve/{revision}/([\w.-]+)", path):
                self._give(found[1])
            elif re.fullmatch(rf"/api/models/org/model/revision/{revision}", path):
                self.answer_json({"id": "org/model", "sha": COMMIT, "siblings": []})
            elif re.fullmatch(rf"/api/models/org/model/tree/{revision}/?", path):
                self.answer_json([entry(one) for one in sorted(folder.iterdir())])
            else:
                is_known = path.startswith("/api/models/org/model/")
                code = "RevisionNotFound" if is_known else "RepoNotFound"
                self.answer(404, b"{}", {"X-Error-Code": code})

        do_HEAD = do_GET

        def _give(self, name: str) -> None:
            data = (folder / name).read_bytes()
            if self.command == "GET":
                hub.asked.append(name)
            etag = hashlib.sha256(data).hexdigest()
            self.answer(200, data, {"X-Repo-Commit": COMMIT, "ETag": f'"{etag}"'})

    with serving(Handler) as hub.address:
        yield hub


def entry(path: Path) -> dict[str, Any]:
    """A file in the listing of a repository."""
    oid = hashlib.sha256(path.read_bytes()).hexdigest()[:40]
    return {"type": "file", "path": path.name, "size": path.stat().st_size, "oid": oid}
