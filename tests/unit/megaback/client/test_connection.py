"""Requests to a server: retries, reasons of refusals, and an API key that is sent to it only."""

import json
import math
import re
import ssl
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest.mock import patch
from urllib.error import URLError

import pytest

from data_pipeline.errors import ConfigError, ServeError
from megaback.client import connection
from megaback.client.connection import Connection

KEY = "sk-not-for-others-0123456789"
OTHER_ANSWERS = (b"<html>", b"[1]", b"[" * 100_000, b'{"n": NaN}', b'{"n": "\xff"}', b" " * 2000)


class _Handler(BaseHTTPRequestHandler):
    asked: list[tuple[str, str | None]] = []

    def _answer(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.asked.append((self.path, self.headers["Authorization"]))
        times = sum(path == self.path for path, _ in self.asked)
        if self.path == "/busy" and times == 1:
            self._answer(503, b"later", Retry_After="0")
        elif self.path == "/moved":
            self._answer(302, b"", Location="/elsewhere")
        elif self.path.removeprefix("http://far") == "/refused":
            self._answer(400, json.dumps({"error": {"message": "no such field"}}).encode())
        elif self.path == "/broken":  # the reason never arrives in whole
            self._answer(500, b"no mem", Content_Length="900")
        elif self.path == "/deep":
            self._answer(500, b"[" * 1999)
        elif self.path == "/key":
            self._answer(401, f"wrong key {self.headers['Authorization'][7:]}".encode())
        elif self.path == "/no%20reason/v1/models":
            self._answer(418, b"")
        elif self.path.startswith("/other"):
            self._answer(200, OTHER_ANSWERS[int(self.path.removeprefix("/other"))])
        else:
            self._answer(200, b'{"found": true}')

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        events = b': a comment\n\ndata: {"n": 1}\n\ndata: {"n": 2}\n\n'
        ends = {
            "/cut": b"",
            "/failed": b'data: {"error": {"message": "out of memory"}}\n\n',
            "/other": b"data: 3\n\n",
            "/endless": b"data: " + b"a" * 3000,
        }
        self._answer(200, events + ends.get(self.path, b"data: [DONE]\n\n"))

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(_Handler, "asked", [])
    monkeypatch.setattr(connection, "_FIRST_WAIT_S", 0.01)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=server.serve_forever, args=(0.02,)).start()
    yield f"http://127.0.0.1:{server.server_port}/v1"
    server.shutdown()
    server.server_close()


def test_a_busy_server_is_asked_again_with_the_key(url: str) -> None:
    assert Connection(url).ask("/busy") == {"found": True}
    assert _Handler.asked == [("/busy", f"Bearer {KEY}")] * 2


def test_a_redirect_is_an_error_so_that_the_key_goes_nowhere_else(url: str) -> None:
    with pytest.raises(ServeError, match="answers 302: it has moved to /elsewhere"):
        Connection(url).ask("/moved")
    assert [path for path, _ in _Handler.asked] == ["/moved"]


def test_a_refusal_has_the_servers_reason(url: str) -> None:
    with pytest.raises(ServeError, match="answers 400: no such field") as caught:
        Connection(url).ask("/refused")
    assert KEY not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "reason"), [("/broken", "500: no mem"), ("/deep", "500: [[[["), ("/key", "401: wrong")]
)
def test_a_refusal_that_is_cut_malformed_or_indiscreet_is_an_error_too(
    url: str, monkeypatch: pytest.MonkeyPatch, path: str, reason: str
) -> None:
    monkeypatch.setenv("MINE", KEY)
    with pytest.raises(ServeError, match=re.escape(reason)) as caught:
        Connection(url, "MINE").ask(path)
    assert KEY not in str(caught.value)


def test_a_path_before_that_of_the_api_is_quoted(url: str) -> None:
    with pytest.raises(ServeError, match="answers 418: I'm a Teapot"):
        Connection(url.replace("/v1", "/no reason/v1/\n")).ask("/v1/models")


def test_a_proxy_is_named_and_does_not_get_what_is_for_this_machine(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("http_proxy", f"http://me:hunter22@{url.split('/')[2]}")
    monkeypatch.setenv("no_proxy", "")
    with pytest.raises(
        ServeError, match=r"^http://far by the proxy http://127\S+ .*: no such field"
    ):
        Connection("http://far").ask("/refused")
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")
    assert Connection(url).ask("/whole") == {"found": True}


def test_a_certificate_that_is_not_trusted_is_an_error_with_what_to_do() -> None:
    cause = ssl.SSLCertVerificationError("self-signed certificate")
    found = Connection("https://127.0.0.1:9")
    with (
        patch.object(found._opener, "open", side_effect=URLError(cause)),
        pytest.raises(ServeError, match=r"is not trusted .*set SSL_CERT_FILE"),
    ):
        found.ask("/v1/models")


@pytest.mark.parametrize("timeout_s", [0, -1, math.nan, math.inf])
def test_a_time_that_is_none_is_refused(timeout_s: float) -> None:
    with pytest.raises(ConfigError, match="`timeout_s`"):
        Connection("http://127.0.0.1:9", timeout_s=timeout_s)


def test_events_are_read_to_the_end_or_it_is_an_error(url: str) -> None:
    found = Connection(url)
    assert list(found.events("/whole", {})) == [{"n": 1}, {"n": 2}]
    with pytest.raises(ServeError, match="ended a stream early"):
        list(found.events("/cut", {}))
    with pytest.raises(ServeError, match="stopped: out of memory"):
        list(found.events("/failed", {}))


@pytest.mark.parametrize("number", range(len(OTHER_ANSWERS)))
def test_an_answer_of_another_form_or_without_end_is_an_error(
    url: str, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    monkeypatch.setattr(connection, "_MAX_ANSWER_BYTES", 1000)
    with pytest.raises(ServeError, match="does not answer as a server of models"):
        Connection(url).ask(f"/other{number}")


@pytest.mark.parametrize(
    ("path", "named"), [("/other", "3 is not an object"), ("/endless", "more than 2,000 bytes")]
)
def test_an_event_of_another_form_or_without_end_is_an_error(
    url: str, monkeypatch: pytest.MonkeyPatch, path: str, named: str
) -> None:
    monkeypatch.setattr(connection, "_MAX_EVENT_BYTES", 2000)
    with pytest.raises(ServeError, match=named):
        list(Connection(url).events(path, {}))


@pytest.mark.parametrize(
    ("address", "named"),
    [
        ("127.0.0.1:8000", "give one like"),
        ("file:///etc/passwd", "give one like"),
        ("http://host:port", "give one like"),
        ("http://host/v1?api_key=hunter22", "remove it"),
        ("http://me:hunter22@host/v1", "give the API key in OPENAI_API_KEY"),
    ],
)
def test_an_address_that_is_none_is_refused(address: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named) as caught:
        Connection(address)
    assert "hunter22" not in str(caught.value)


def test_a_malformed_key_is_refused_and_not_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", f"{KEY}\nX-Other: 1")
    with pytest.raises(ConfigError, match="MY_KEY is not an API key") as caught:
        Connection("http://127.0.0.1:8000", "MY_KEY")
    assert KEY not in str(caught.value)


def test_no_server_is_an_error_with_what_to_do() -> None:
    with pytest.raises(ServeError, match="start a server there"):
        Connection("http://127.0.0.1:9").ask("/v1/models")
