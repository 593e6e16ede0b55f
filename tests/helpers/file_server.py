"""A local HTTP file server with faults on request, and short retries."""

import base64
import gzip
import json
import re
import socket
import struct
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import zstandard

from data_pipeline.sources.registry import Columns, Document, list_slices, read_slice
from data_pipeline.storage.retries import RetryPolicy

QUICK = RetryPolicy(
    max_attempts=4,
    first_wait_s=0.002,
    max_wait_s=0.004,
    max_total_s=5,
    stall_timeout_s=0.15,
)


TEXTS = [f"document {number} " * (number % 7) for number in range(60)]


def write_files(folder: Path) -> Path:
    """Write one file of each kind with the same records, and a plain text. Returns the folder."""
    rows = [
        {"text": text, "language": "en", "language_score": number / 100}
        for number, text in enumerate(TEXTS)
    ]
    table = pa.Table.from_pylist([{"id": number, **row} for number, row in enumerate(rows)])
    pq.write_table(table, folder / "a.parquet", row_group_size=7)
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (folder / "a.jsonl").write_bytes(lines)
    (folder / "a.jsonl.gz").write_bytes(gzip.compress(lines))
    (folder / "a.jsonl.zst").write_bytes(zstandard.compress(lines))
    (folder / "a.txt").write_bytes(b"some plain text, " * 100)
    return folder


def documents(source: str, columns: Columns | None = None) -> list[Document]:
    """All documents of a source."""
    columns = columns or Columns()
    return [
        document
        for piece in list_slices(source, columns)
        for document in read_slice(piece, columns)
    ]


class FileServer:
    """Files by name over HTTP; each request consumes one of `faults`, if any are left."""

    def __init__(self) -> None:
        self.is_closing = threading.Event()
        self.port = 0
        self.forget()

    def forget(self) -> None:
        """Remove all files and faults."""
        self.files: dict[str, bytes] = {}
        self.versions: dict[str, str] = {}
        self.faults: deque[str] = deque()
        self.gives_ranges = True
        self.gives_versions = True
        self.requests: list[str] = []
        self.targets: list[str] = []
        self.redirects: dict[str, str] = {}
        self.key = ""
        """Login and query that every request must have, if any."""

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.port}/{name}"


@contextmanager
def serving() -> Iterator[FileServer]:
    """A server that runs until the block ends."""
    state = FileServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # headers and body are two small packets

        def do_GET(self) -> None:
            name = self.path.partition("?")[0].lstrip("/")
            state.requests.append(f"{name} {self.headers.get('Range')}")
            state.targets.append(self.path)
            fault = state.faults.popleft() if state.faults else ""
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.connection.close()
                self.close_connection = True
            elif fault == "stall":
                state.is_closing.wait(5)
                self.close_connection = True
            elif fault.isdigit():
                self._answer(int(fault), b"an error")
            elif not self._is_allowed():
                self._answer(403, b"")
            elif name in state.redirects:
                self._answer(302, b"", {"Location": state.redirects[name]})
            elif name not in state.files:
                self._answer(404, b"")
            else:
                self._give(name, state.files[name], is_cut=fault == "cut")

        def _is_allowed(self) -> bool:
            login = self.headers.get("Authorization", "").removeprefix("Basic ")
            return state.key in self.path and state.key.encode() in base64.b64decode(login)

        def _give(self, name: str, data: bytes, *, is_cut: bool) -> None:
            headers = {}
            if state.gives_versions:
                headers["ETag"] = f'"{state.versions.get(name, "1")}"'
            match = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            if match is None or not state.gives_ranges:
                self._answer(200, data, headers, is_cut)
                return
            start, stop = int(match[1]), min(int(match[2]) + 1, len(data))
            if start >= len(data):
                self._answer(416, b"", {**headers, "Content-Range": f"bytes */{len(data)}"})
                return
            headers["Content-Range"] = f"bytes {start}-{stop - 1}/{len(data)}"
            self._answer(206, data[start:stop], headers, is_cut)

        def _answer(
            self,
            status: int,
            body: bytes,
            headers: dict[str, str] | None = None,
            is_cut: bool = False,
        ) -> None:
            self.send_response(status)
            for key, value in (headers or {}).items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            try:
                self.wfile.write(body[: len(body) // 2] if is_cut else body)
            except OSError:  # the client has read enough
                self.close_connection = True
            if is_cut:
                self.close_connection = True

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            pass

    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: object, client_address: object) -> None:
            pass  # some tests disconnect clients on purpose

    server = Server(("127.0.0.1", 0), Handler)
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        state.is_closing.set()
        server.shutdown()
        server.server_close()
        thread.join()
