"""Connections: slow senders, slow readers, malformed requests and pipelining."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import pytest

from data_pipeline.text.codec import TextCodec
from tests.helpers.server import (
    Running,
    endless_prompt,
    metric,
    posted,
    raw,
    serving,
    tiny_models,
    wait_until,
)
from tools.serving.idle_timeout import IdleTimeoutConnection
from tools.serving.models import ServedModel
from tools.serving.request_limits import Limits

Codecs = Callable[..., TextCodec]
HEAD = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
SMALL = {"prompt": "a", "max_tokens": 1}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[str, ServedModel]:
    return tiny_models(tmp_path_factory.mktemp("serve"), codec)


@pytest.fixture(scope="module")
def running(models: dict[str, ServedModel]) -> Iterator[Running]:
    with serving(models, Limits(body_s=0.5)) as running:
        yield running


@pytest.fixture(scope="module")
def large(models: dict[str, ServedModel]) -> dict[str, Any]:
    """A request whose answer has several megabytes."""
    prompt = endless_prompt(models["tiny"])
    return {"prompt": prompt, "n": 8, "max_tokens": 1500, "temperature": 0, "logprobs": 20}


def connections(running: Running) -> list[IdleTimeoutConnection]:
    return [one for one in running.server.server_state.connections if one.cycle is not None]  # type: ignore[misc]


def rest_of(connection: socket.socket) -> bytes:
    return b"".join(iter(lambda: connection.recv(1 << 16), b""))


def buffered(running: Running) -> int:
    return max((one.transport.get_write_buffer_size() for one in connections(running)), default=0)


@pytest.mark.parametrize("order", ["reading", "writing"])
def test_an_unread_stream_is_closed_and_its_samples_are_canceled(
    models: dict[str, ServedModel],
    large: dict[str, Any],
    order: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(IdleTimeoutConnection, "seconds_for_a_part", 0.5)
    body = {**large, "model": "ahead", "stream": True, "stream_order": order, "ignore_eos": True}
    with serving(models) as running, raw(running, posted(body)) as connection:
        wait_until(lambda: metric(running, "samples_running", "ahead") == 8)
        wait_until(lambda: buffered(running) > 0, 60)
        assert buffered(running) < 1 << 17
        wait_until(lambda: metric(running, "requests_given_up_total") == 1)
        wait_until(lambda: metric(running, "samples_running", "ahead") == 0)
        assert metric(running, "written_tokens_total", "ahead") < 8 * 1500
        assert b"[DONE]" not in rest_of(connection)


def test_an_unread_answer_is_closed_without_buffering_it(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdleTimeoutConnection, "seconds_for_a_part", 0.5)
    body = {"prompt": "a map " * 8000, "truncate": True, "echo": True, "n": 60, "max_tokens": 0}
    with serving(models) as running, raw(running, posted(body)) as connection:
        wait_until(lambda: buffered(running) > 0)
        assert buffered(running) <= 1 << 16
        wait_until(lambda: not connections(running))
        assert len(rest_of(connection)) < 1 << 20


def test_a_slow_reader_gets_the_whole_answer(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdleTimeoutConnection, "seconds_for_a_part", 0.8)
    body = {"prompt": "a map " * 8000, "truncate": True, "echo": True, "n": 14, "max_tokens": 0}
    content = b""
    with serving(models) as running, raw(running, posted(body)) as connection:
        started_s = time.monotonic()
        while not content.endswith(b"}"):
            content += connection.recv(1 << 15)
            time.sleep(0.006)
    assert time.monotonic() - started_s > 1
    choices = json.loads(content.partition(b"\r\n\r\n")[2])["choices"]
    assert [choice["text"] for choice in choices] == [body["prompt"]] * 14


def trickle(connection: socket.socket) -> None:
    """Send a byte every 50 ms for 20 s; raises ConnectionError once the server closes it."""
    ends_s = time.monotonic() + 20
    while time.monotonic() < ends_s:
        connection.sendall(b"x")
        time.sleep(0.05)


@pytest.mark.parametrize(
    "begun",
    [
        b"",
        b"GET /health HT",
        b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: ",
        posted(SMALL) + HEAD,
        b"POST / HTTP/1.1\r\nHost: localhost\r\nContent-Length: 999999\r\n\r\n",
    ],
    ids=["nothing", "line", "header", "second request", "body of an unknown path"],
)
def test_a_request_sent_byte_by_byte_times_out(
    running: Running, begun: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdleTimeoutConnection, "seconds_for_a_request", 0.4)
    with raw(running, begun) as connection:
        wait_until(lambda: len(running.server.server_state.connections) > 0)
        with pytest.raises(ConnectionError):
            trickle(connection)


def test_a_connection_is_closed_after_the_keep_alive_timeout(
    models: dict[str, ServedModel],
) -> None:
    with serving(models) as running:
        assert running.server.config.timeout_keep_alive == 30
        running.server.config.timeout_keep_alive = 0.3  # type: ignore[assignment]
        with raw(running, posted(SMALL)) as connection:
            answer = rest_of(connection)
    assert answer.startswith(b"HTTP/1.1 200 OK\r\n")


def test_a_slow_chunked_body_times_out(running: Running) -> None:
    begun = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
    with raw(running, begun) as connection:
        for _ in range(8):
            connection.sendall(b"1\r\n{\r\n")
            time.sleep(0.03)
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 408 ")
    with raw(running, begun + b"zz\r\n") as connection:
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 400 ")


def test_slow_bodies_do_not_block_other_requests(models: dict[str, ServedModel]) -> None:
    begun = HEAD + b"Content-Length: 100\r\n\r\n{"
    with serving(models, replace(Limits(), open_requests=4)) as running, ExitStack() as stack:
        slow = [stack.enter_context(raw(running, begun)) for _ in range(4)]
        wait_until(lambda: metric(running, "requests_open") == 5)
        assert running.post("/v1/completions", SMALL).status_code == 200
        assert slow[0].recv(1 << 16).startswith(b"HTTP/1.1 408 ")
        assert metric(running, "requests_open") == 4


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 20_000 + b"\r\n\r\n", b"431"),
        (b"GET /" + b"a" * 20_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", b"431"),
        (b"GET /" + b"a" * 17_000, b"400"),
        (b"GET /\xff HTTP/1.1\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /%ff%00 HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404"),
        (b"GET /health HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: localhost\r\n\r\n", b"400"),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nBad header\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: -1\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n{}", b"400"),
        (HEAD + b"Content-Length: " + b"9" * 19 + b"\r\n\r\n", b"408"),
        (HEAD + b"Transfer-Encoding: gzip\r\n\r\n", b"501|400"),
        (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", b"403"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\x00" * 100, b"400"),
        (b"GET /health HTTP/1.0\r\n\r\n", b"403"),
        (b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n", b"200"),
        (b"GET http://localhost/health HTTP/1.1\r\nHost: localhost\r\n\r\n", b"404|200"),
        (
            b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
            b"Upgrade: websocket\r\n\r\n",
            b"200",
        ),
        # An answer that begins before the body arrives; the body is then malformed.
        (
            b"POST / HTTP/1.1\r\nHost: evil.example\r\nTransfer-Encoding: chunked\r\n\r\n",
            b"403",
        ),
    ],
)
def test_malformed_requests_are_rejected_without_a_traceback(
    running: Running,
    sent: bytes,
    status: bytes,
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with raw(running, sent) as connection:
        assert re.match(rb"HTTP/1.1 (%s) " % status, connection.recv(1 << 16))
        connection.sendall(b"zz\r\n" * 10)
    assert running.get("/health").status_code == 200
    assert "Traceback" not in capfd.readouterr().err + caplog.text


def test_http_1_0_gets_answers_and_streams_without_chunked_encoding(running: Running) -> None:
    for stream in (False, True):
        sent = posted({**SMALL, "stream": stream}).replace(b"HTTP/1.1", b"HTTP/1.0")
        with raw(running, sent) as connection:
            answer = rest_of(connection)
        assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
        assert b"chunked" not in answer
        assert answer.endswith(b"data: [DONE]\n\n" if stream else b"}")


def test_expect_100_continue_is_answered(running: Running) -> None:
    body = json.dumps(SMALL).encode()
    for length, status in ((len(body), b"100"), (2 << 20, b"413")):
        head = HEAD + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % length
        with raw(running, head) as connection:
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 %s " % status)
            if status == b"100":
                connection.sendall(body)
                assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 ")


def test_a_disconnect_is_noticed_behind_a_pipelined_request(
    models: dict[str, ServedModel], large: dict[str, Any]
) -> None:
    with serving(models) as running:
        with raw(running, posted(large) + posted(large)) as connection:
            wait_until(lambda: metric(running, "samples_running", "tiny") == 8)
            connection.sendall(posted(large))
        wait_until(lambda: metric(running, "samples_running", "tiny") == 0)
        assert metric(running, "written_tokens_total", "tiny") < 8 * 1500


def test_pipelined_requests_are_answered_in_order_up_to_a_size(running: Running) -> None:
    small, last = posted(SMALL), posted(SMALL, headers="Connection: close\r\n")
    with raw(running, small * 4 + last) as connection:
        assert rest_of(connection).count(b"HTTP/1.1 200 OK") == 5
    with raw(running, small) as connection, pytest.raises(ConnectionError):
        connection.sendall(small * 100_000)
    assert running.get("/health").status_code == 200
