"""Limits of requests, invalid requests, and access control."""

import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from typing import Any

import httpx
import openai
import psutil
import pytest
import torch

from data_pipeline.text.codec import TextCodec
from tests.helpers.server import (
    CONTEXT_TOKENS,
    Running,
    endless_prompt,
    metric,
    serving,
    tiny_models,
    wait_until,
)
from tools.serving import completions, request_limits
from tools.serving.idle_timeout import IdleTimeoutConnection
from tools.serving.models import ServedModel
from tools.serving.request_limits import Limits

Codecs = Callable[..., TextCodec]

TOKEN = "a-token-of-more-than-16"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[str, ServedModel]:
    return tiny_models(tmp_path_factory.mktemp("serve"), codec)


@pytest.fixture(scope="module")
def running(models: dict[str, ServedModel]) -> Iterator[Running]:
    with serving(models) as running:
        yield running


@pytest.fixture(scope="module")
def endless(models: dict[str, ServedModel]) -> str:
    return endless_prompt(models["tiny"])


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b'{"prompt": "\xff\xfe"}', 400, "not UTF-8 from byte 13"),
        (b"[" * 100_000, 400, "nested too deeply"),
        (b'{"seed": ' + b"9" * 5000 + b"}", 400, "digits"),
        (b'{"prompt": NaN}', 400, "NaN is not a JSON number"),
        (b"null", 400, "body"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "1e999 is not a finite number"),
        (b'{"prompt": "a", "temprature": 1}', 400, "temprature"),
        (b'{"prompt": "a", "best_of": 3}', 400, "best_of"),
        (b'{"prompt": "a", "presence_penalty": false}', 400, "presence_penalty"),
        (b'{"prompt": "a", "stream_options": {"include_obfuscation": 0}}', 400, "obfuscation"),
        (b'{"prompt": "a", "logit_bias": {"5": 1}}', 400, "logit_bias"),
        (b'{"prompt": "a", "max_tokens": 999999}', 400, "max_tokens"),
        (b'{"prompt": "a", "n": 64, "model": "\\ud800"}', 404, "tiny"),
        (b'{"prompt": [], "n": 1}', 400, "prompt"),
        (b'{"prompt": [1, "a"]}', 400, "prompt"),
        (b'{"prompt": [1, 99999]}', 400, "token 99999 does not exist"),
        (
            b'{"prompt": "a", "stop_token_ids": [99999]}',
            400,
            "stop_token_ids: 99999 does not exist",
        ),
        (b'{"prompt": [[1], []]}', 400, "prompt"),
        (b'{"prompt": [true]}', 400, "prompt"),
        (b'{"prompt": [' + b"[1]," * 150_000 + b"[1]]}", 400, "at most 64"),
        (b'{"prompt": "a", "top_k": -2}', 400, "top_k"),
        (b'{"prompt": "a", "min_tokens": 9, "max_tokens": 8}', 400, "above max_tokens 8"),
        (b'{"prompt": "a", "seed": -1}', 400, "seed"),
        (b'{"prompt": "a", "stop": ""}', 400, "stop"),
        (json.dumps({"prompt": "a map " * 60}).encode(), 400, "shorten"),
        (json.dumps({"prompt": "a" * 500_000}).encode(), 400, "shorten"),
        (json.dumps({"prompt": ["a"] * 33, "n": 2}).encode(), 400, "exceeds the limit of 64"),
        (
            b'{"prompt": ["a", "b"], "n": 2, "max_tokens": 4096, "logprobs": 20}',
            400,
            "prompts x n x max_tokens x (1 + logprobs) is 344064; the limit per request is 262144",
        ),
        (
            json.dumps({"prompt": "a" * 70_000, "truncate": True, "echo": True, "n": 64}).encode(),
            400,
            "4480000 characters in all; the limit is 4194304",
        ),
    ],
)
def test_invalid_requests_are_rejected_with_an_error_of_their_field(
    running: Running, body: bytes, status: int, words: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers=headers, timeout=60)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert words in error["message"]
    assert error["param"] is None or f'"{error["param"]}"' in body.decode("utf-8", "replace")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", {"prompt": "a", "n": 4, "max_tokens": 51}),
        ("completions", {"prompt": ["a", "b"], "n": 2, "max_tokens": 10, "logprobs": 5}),
        ("completions", {"prompt": "a map " * 8, "n": 8, "max_tokens": 0, "echo": True}),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "n": 4}),
        ("backchat", {"response": "a", "n": 8, "max_tokens": 26}),
    ],
)
def test_log_probabilities_of_an_answer_are_limited(
    running: Running, path: str, body: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    body = {**body, "logprobs": 5} if "echo" in body else body
    assert running.post(f"/v1/{path}", body).status_code == 200
    monkeypatch.setattr(request_limits, "MAX_ANSWER_NUMBERS", 200)
    answer = running.post(f"/v1/{path}", body)
    assert answer.status_code == 400
    assert "; the limit per request is 200" in answer.json()["error"]["message"]


def test_a_body_of_ten_megabytes_is_rejected_without_leaking_memory(running: Running) -> None:
    body = json.dumps({"prompt": "word " * 2_000_000})
    before = psutil.Process().memory_info().rss
    for headers in [{}] * 4 + [{"connection": "close"}]:  # which must not reset the connection
        url = f"{running.url}/v1/completions"
        answer = httpx.post(url, content=body, headers=headers, timeout=30)
        assert answer.status_code == 413
    chunks = (b"x" * 65536 for _ in range(160))  # without a Content-Length
    assert httpx.post(f"{running.url}/v1/score", content=chunks).status_code == 413
    assert psutil.Process().memory_info().rss - before < 60 << 20


def test_a_disconnect_frees_the_slots(running: Running, endless: str) -> None:
    body = {"prompt": endless, "max_tokens": 4096, "n": 8, "temperature": 0, "stream": True}
    body |= {"stream_order": "writing"}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # kept: collecting the iterator would close the connection
        next(lines)
        wait_until(lambda: metric(running, "samples_running", "tiny") == 8)
    wait_until(lambda: metric(running, "samples_running", "tiny") == 0)
    request = httpx.Request("POST", f"{running.url}/v1/completions", json={**body, "stream": False})
    with pytest.raises(httpx.ReadTimeout):
        httpx.Client(timeout=0.5).send(request)
    wait_until(lambda: metric(running, "samples_running", "tiny") == 0)
    assert metric(running, "requests_given_up_total") >= 2


def test_a_thousand_idle_connections_do_not_block_requests(running: Running) -> None:
    port = int(running.url.rsplit(":", 1)[1])
    left = []
    try:
        for number in range(1000):
            connection = socket.create_connection(("127.0.0.1", port), timeout=10)
            if number % 2:
                connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: loc")
            left.append(connection)
        assert running.post("/v1/completions", {"prompt": "a", "max_tokens": 2}).status_code == 200
        open_now = len(running.server.server_state.connections)
        assert open_now <= IdleTimeoutConnection.max_connections + 5
    finally:
        for connection in left:
            connection.close()


def test_a_connection_without_a_request_is_closed(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(IdleTimeoutConnection, "seconds_for_a_request", 0.3)
    with serving(models) as running:
        port = int(running.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            for letter in b"GET":
                connection.sendall(bytes([letter]))
                time.sleep(0.05)
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""


def test_a_configured_token_is_required(models: dict[str, ServedModel]) -> None:
    with serving(models, token=TOKEN) as running:
        for path in ("/v1/models", "/metrics"):
            for sent in ({}, {"authorization": "Bearer wrong"}, {"authorization": TOKEN}):
                answer = running.get(path, headers=sent)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
        client = openai.OpenAI(base_url=f"{running.url}/v1", api_key=TOKEN)
        assert client.completions.create(model="tiny", prompt="a", max_tokens=2).choices
        assert running.get("/health").status_code == 200
        assert (
            TOKEN not in running.get("/metrics", headers={"authorization": f"Bearer {TOKEN}"}).text
        )


def test_a_proxy_may_send_any_host_if_there_is_a_token(
    models: dict[str, ServedModel], running: Running
) -> None:
    sent = {"origin": "https://demo.example.org", "host": "backend:8134"}
    body = {"prompt": "a", "max_tokens": 1}
    with serving(models, token=TOKEN) as guarded:
        known = {**sent, "authorization": f"Bearer {TOKEN}"}
        assert guarded.post("/v1/completions", body, headers=known).status_code == 200
        assert guarded.post("/v1/completions", body, headers=sent).status_code == 401
    without = guarded_message(running, {**sent, "host": "localhost"})
    assert "demo.example.org" in without
    assert "--allow-host" in without
    assert "or with a token" in without
    assert "--allow-host backend:8134, or with a token" in guarded_message(running, sent)


def guarded_message(running: Running, headers: dict[str, str]) -> str:
    answer = running.post("/v1/completions", {"prompt": "a"}, headers=headers)
    assert answer.status_code == 403
    return str(answer.json()["error"]["message"])


@pytest.mark.parametrize("path", ["/", "/health", "/metrics", "/v1/models", "/v1/models/tiny"])
def test_head_is_get_without_the_body(running: Running, path: str) -> None:
    head, got = httpx.head(running.url + path), running.get(path)
    assert (head.status_code, head.content) == (200, b"")
    assert head.headers["content-type"] == got.headers["content-type"]


def test_a_body_of_a_content_type_other_than_json_is_rejected(running: Running) -> None:
    body = b'{"prompt": "a", "max_tokens": 1}'
    url = f"{running.url}/v1/completions"
    assert httpx.post(url, content=body).status_code == 200
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data"):
        answer = httpx.post(url, content=body, headers={"content-type": kind})
        assert answer.status_code == 415
        assert "Content-Type: application/json" in answer.json()["error"]["message"]


def test_a_compressed_body_is_rejected(running: Running) -> None:
    headers = {"content-type": "application/json", "content-encoding": "gzip"}
    body = gzip.compress(b'{"prompt": "a"}')
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers=headers, timeout=60)
    assert answer.status_code == 415
    assert "without compression" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("method", "path", "status", "words"),
    [
        ("POST", "/v1/embeddings", 404, "/v1/embeddings does not exist"),
        ("GET", "/v1/nothing", 404, "/v1/nothing does not exist"),
        ("POST", "/", 404, "does not exist"),
        ("GET", "/v1/completions", 405, "takes POST, not GET"),
        ("PUT", "/v1/models", 405, "takes GET, not PUT"),
        ("OPTIONS", "/v1/completions", 405, "takes POST, not OPTIONS"),
    ],
)
def test_unknown_paths_and_methods_are_rejected(
    running: Running, method: str, path: str, status: int, words: str
) -> None:
    answer = httpx.request(method, running.url + path)
    assert answer.status_code == status
    assert words in answer.json()["error"]["message"]
    assert ("allow" in answer.headers) == (status == 405)


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}]
)
def test_other_hosts_and_origins_get_403(running: Running, headers: dict[str, str]) -> None:
    assert running.get("/v1/models", headers=headers).status_code == 403


def test_requests_beyond_the_limits_get_503_with_retry_after(
    models: dict[str, ServedModel], endless: str
) -> None:
    limits = Limits(open_requests=2, waiting_samples=4, request_s=1.5)
    with serving(models, limits) as running:
        long = {"prompt": endless, "max_tokens": 4096, "temperature": 0, "n": 8}
        with ThreadPoolExecutor(4) as pool:
            answers = list(pool.map(lambda _: running.post("/v1/completions", long), range(4)))
        codes = sorted(answer.status_code for answer in answers)
        assert codes[0] == 200
        assert codes[-1] == 503
        assert all(a.headers["retry-after"] for a in answers if a.status_code == 503)
        # The deadline passed: the answer is the partial text.
        (first, *_) = [answer for answer in answers if answer.status_code == 200]
        assert {choice["finish_reason"] for choice in first.json()["choices"]} == {"length"}


def test_an_incomplete_body_times_out(models: dict[str, ServedModel]) -> None:
    with serving(models, replace(Limits(), body_s=0.3)) as running:
        port = int(running.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(
                b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(1000)


def test_every_answer_has_a_strict_content_security_policy(running: Running) -> None:
    for path in ("/", "/v1/models", "/nowhere"):
        policy = running.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
    assert running.get("/../../setup.py").status_code == 404
    assert running.get("/%2e%2e/app.py").status_code == 404


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("a defect"), 500), (torch.OutOfMemoryError("CUDA out of memory."), 503)],
    ids=["defect", "out of memory"],
)
@pytest.mark.parametrize(
    ("name", "path", "body"),
    [
        ("step", "completions", {"prompt": "a", "max_tokens": 3}),
        ("read_steps", "completions", {"prompt": "unread", "max_tokens": 3}),
        ("score_steps", "score", {"texts": ["a"]}),
    ],
    ids=["step", "prompt", "score"],
)
def test_work_that_fails_is_an_error_and_the_next_request_succeeds(
    name: str,
    path: str,
    body: dict[str, Any],
    error: Exception,
    status: int,
    running: Running,
    models: dict[str, ServedModel],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise error

    if "prompt" in body:  # the state after the last prompt is kept
        body = body | {"prompt": f"{body['prompt']} {status}"}
    with monkeypatch.context() as patch:
        patch.setattr(models["tiny"].decoder, name, broken)
        answer = running.post(f"/v1/{path}", body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (status, "server_error")
    assert running.post(f"/v1/{path}", body).status_code == 200


@pytest.mark.parametrize(
    ("owner", "name", "path", "body"),
    [
        (TextCodec, "encode", "completions", {"prompt": "a", "max_tokens": 2}),
        (TextCodec, "encode", "backchat", {"response": "a", "max_tokens": 2}),
        (TextCodec, "encode_document", "score", {"texts": ["a"]}),
        (TextCodec, "render", "backchat", {"response": "a", "max_tokens": 2, "n": 1}),
        (completions, "log_probs", "completions", {"prompt": "a", "max_tokens": 2, "logprobs": 1}),
        (completions, "offsets", "completions", {"prompt": "a", "echo": True, "logprobs": 1}),
    ],
)
def test_work_linear_in_a_texts_length_does_not_block_the_event_loop(
    running: Running,
    monkeypatch: pytest.MonkeyPatch,
    owner: object,
    name: str,
    path: str,
    body: dict[str, Any],
) -> None:
    is_running, may_continue = threading.Event(), threading.Event()
    original = getattr(owner, name)

    def blocked(*arguments: Any) -> Any:
        is_running.set()
        assert may_continue.wait(60)
        return original(*arguments)

    with monkeypatch.context() as patch, ThreadPoolExecutor(1) as pool:
        patch.setattr(owner, name, blocked)
        asking = pool.submit(running.post, f"/v1/{path}", body)
        try:
            assert is_running.wait(30)
            assert httpx.get(f"{running.url}/health", timeout=10).status_code == 200
        finally:
            may_continue.set()
        assert asking.result().status_code == 200


def test_only_the_kept_part_of_a_truncated_prompt_is_encoded_and_counted(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths: list[int] = []
    original = TextCodec.encode

    def counted(codec: TextCodec, text: str) -> Any:
        lengths.append(len(text))
        return original(codec, text)

    monkeypatch.setattr(TextCodec, "encode", counted)
    body = {"prompt": "\u2581a" * 200_000, "truncate": True, "max_tokens": 1}
    usage = running.post("/v1/completions", body).json()["usage"]
    assert usage["prompt_tokens"] == CONTEXT_TOKENS // 2 + 1  # and the held-back piece
    assert sum(lengths) < 10_000


def test_a_long_field_name_is_truncated_in_the_error(running: Running) -> None:
    answer = running.post("/v1/completions", {"prompt": "a", "k" * 500_000: 1})
    assert answer.status_code == 400
    assert len(answer.text) < 1000
