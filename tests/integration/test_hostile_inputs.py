"""Hostile inputs of the data pipeline.

Each is refused with an error message, in seconds and bounded memory; nothing else is written.
"""

import json
import os
import shutil
import signal
import socket
import threading
import time
from base64 import b64encode
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.build.command import build_planned
from data_pipeline.build.plan import Plan
from data_pipeline.errors import MegabackError
from data_pipeline.redaction import remember, scrub
from data_pipeline.shards.manifest import Manifest
from data_pipeline.sources.pydocs import list_pydocs_slices
from data_pipeline.storage import retries
from data_pipeline.storage.remote_file import RemoteFile
from data_pipeline.storage.retries import RetryPolicy
from data_pipeline.text.codec import Direction, TextCodec, Unit
from tests.helpers.hostile_files import bounded

_MAX_S = 5


@contextmanager
def refused() -> Iterator[None]:
    """Context in which an operation ends with a one-line error, soon and in bounded memory."""

    def stop(*_: object) -> None:
        raise AssertionError(f"it took more than {_MAX_S} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(_MAX_S)
    try:
        with bounded(_MAX_S), pytest.raises(MegabackError) as caught:
            yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    assert len(str(caught.value)) < 2000


@pytest.fixture
def planned(tiny_shards: Path, tmp_path: Path) -> Path:
    """A planned build without finished tasks."""
    out = tmp_path / "shards"
    (out / ".build").mkdir(parents=True)
    for name in ("plan.json", "tokenizer.model"):
        shutil.copy(tiny_shards / name, out / name)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "zeros").symlink_to("/dev/zero")
    return out


def reading(**changed: object) -> Callable[[dict[str, Any]], None]:
    """A change to the first file of a plan."""
    return lambda plan: plan["inputs"][0][0].update(changed)


PLANS: dict[str, Callable[[dict[str, Any]], object]] = {
    "a pipe of lines": reading(path="pipe"),
    "a pipe of rows": reading(path="pipe", kind="parquet"),
    "a pipe of files": reading(path="pipe", kind="zip"),
    "zeros without end": reading(path="zeros"),
    "a device": reading(path="/dev/zero", kind="text"),
    "a folder": reading(path="."),
    "a path with a NUL": reading(path="a\0b"),
    "a path with a lone surrogate": reading(path="\ud800"),
    "no path": reading(path=""),
    "an unknown kind": reading(kind="__import__"),
    "all of Python's documentation": reading(kind="pydocs", path="x", slices=[[0, 1 << 60, 1]]),
    "a novel out of its folder": reading(kind="novels", path="../../../../etc/passwd"),
    "a million empty tasks": lambda plan: plan["task_portions"].extend([0] * (1 << 20)),
}


@pytest.mark.parametrize("hostile", PLANS)
def test_a_plan_reads_only_what_can_be_a_source(
    planned: Path, codec: Callable[..., TextCodec], hostile: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(planned.parent)
    list_pydocs_slices()  # the installation is walked once
    fields = json.loads((planned / "plan.json").read_text())
    PLANS[hostile](fields)
    (planned / "plan.json").write_text(json.dumps(fields))
    with refused():
        build_planned(Plan.load(planned), codec(), planned, workers=1)
    assert not list(planned.glob("*.zst"))


def test_a_manifest_whose_source_is_megabytes_is_refused(tiny_shards: Path, tmp_path: Path) -> None:
    fields = json.loads((tiny_shards / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps({**fields, "source": "a" * 20_000_000}))
    with refused():
        Manifest.load(tmp_path)


def drop_by_drop(client: socket.socket) -> None:
    client.sendall(
        b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-99/100\r\nContent-Length: 100\r\n\r\n"
    )
    while True:
        client.sendall(b"x")
        threading.Event().wait(0.05)


def a_byte_of_many(client: socket.socket) -> None:
    client.sendall(b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-0/100\r\nContent-Length: 1\r\n\r\nx")


def not_yet(client: socket.socket) -> None:
    while True:
        client.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        threading.Event().wait(0.02)


ANSWERS = (drop_by_drop, a_byte_of_many, not_yet)


@contextmanager
def server(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that answers only the first request of each connection correctly."""
    facts = b"HTTP/1.1 206 P\r\nContent-Range: bytes 0-0/100\r\nContent-Length: 1\r\n\r\nx"

    def serve(client: socket.socket) -> None:
        with client:
            try:
                while request := client.recv(1 << 16):
                    if b"bytes=0-0\r\n" in request:
                        client.sendall(facts)
                    else:
                        answer(client)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                client = listener.accept()[0]
            except OSError:
                return
            threading.Thread(target=serve, args=(client,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        threading.Thread(target=accept, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}/a.jsonl"
        finally:
            listener.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize("answer", ANSWERS)
def test_a_server_that_sends_next_to_nothing_has_stalled(
    answer: Callable[[socket.socket], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    policy = RetryPolicy(max_attempts=2, first_wait_s=0.01, max_wait_s=0.02, stall_timeout_s=0.3)
    monkeypatch.setattr(retries, "POLICY", policy)
    with server(answer) as url, refused():
        RemoteFile(url).read()


def test_a_login_that_a_server_sends_back_is_not_shown() -> None:
    for userinfo in ("reader:correct-horse", "correct-horse-token", "reader:p%40ssw%2Frd"):
        remember(userinfo, is_password=True)
    for login in (b"reader:correct-horse", b"correct-horse-token:", b"reader:p@ssw/rd"):
        sent = b64encode(login).decode()
        assert sent.rstrip("=") not in scrub(f"404 no such login: {sent} (Basic {sent})")


def test_a_tokenizer_of_hundreds_of_thousands_of_pieces_is_used_at_once(
    tokenizer_path: Path,
) -> None:
    from sentencepiece import sentencepiece_model_pb2 as model

    tokenizer = model.ModelProto.FromString(tokenizer_path.read_bytes())
    for number in range(300_000):
        tokenizer.pieces.add(piece=f"z{number:x}", score=-number, type=4)
    codec = TextCodec(tokenizer.SerializeToString(), Direction.BACKWARD, Unit.TOKEN)
    started = time.process_time()
    assert codec.encoder_name == "sentencepiece"
    assert time.process_time() - started < 1
