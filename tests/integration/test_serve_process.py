"""`megaback serve` as a process: start, authentication, shutdown."""

import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest

from data_pipeline.text.codec import Direction, TextCodec
from megaback.config import ModelSection
from tests.helpers.server import num_running, posted, started, wait_until, write_tiny_model

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", codec())


def is_writing(url: str) -> bool:
    return num_running(url) > 0


def test_sigterm_finishes_running_requests_and_exits_with_zero(folder: Path) -> None:
    with started(folder) as (process, url):
        answers: list[httpx.Response] = []

        def ask() -> None:
            body: dict[str, Any] = {"prompt": "it.", "n": 16, "max_tokens": 2000, "seed": 1}
            answers.append(httpx.post(f"{url}/v1/completions", json=body, timeout=60))

        asking = threading.Thread(target=ask)
        asking.start()
        while not is_writing(url):
            assert not answers, answers[0].text[:200]
        process.send_signal(signal.SIGTERM)
        asking.join(60)
        _, errors = process.communicate(timeout=60)
        assert [answer.status_code for answer in answers] == [200]
        assert all(choice["finish_reason"] for choice in answers[0].json()["choices"])
        assert (process.returncode, errors) == (0, "")
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{url}/health")


def test_on_an_open_address_a_token_is_needed_and_never_shown(folder: Path, tmp_path: Path) -> None:
    token = "0123456789abcdef-secret"
    (tmp_path / "token").write_text(token + "\n")
    with started(folder, "--host", "0.0.0.0", "--token-file", tmp_path / "token") as (process, url):
        for _ in range(2):
            body = {"prompt": "it.", "max_tokens": 2}
            assert httpx.post(f"{url}/v1/completions", json=body).status_code == 401
        headers = {"authorization": f"Bearer {token}"}
        answer = httpx.post(f"{url}/v1/completions", json=body, headers=headers)
        assert answer.status_code == 200
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (130, "megaback: interrupted\n")
        assert token not in output + errors


def test_openais_client_writes_from_ids_and_chats_with_a_process(
    folder: Path, codec: Callable[..., TextCodec]
) -> None:
    ids = codec().encode_document("the last map.").tolist()[:-1]
    with started(folder) as (_, url):
        client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
        written = client.completions.create(
            model="tiny", prompt=ids, max_tokens=4, stop=None, extra_body={"ignore_eos": True}
        )
        assert written.usage is not None
        assert (written.usage.prompt_tokens, written.usage.completion_tokens) == (len(ids), 4)
        messages: Any = [{"role": "user", "content": "the last map."}]
        chunks = client.chat.completions.create(
            model="tiny", messages=messages, max_tokens=4, stream=True
        )
        assert [chunk.choices[0].finish_reason for chunk in chunks][-1] in ("stop", "length")


@pytest.mark.parametrize(
    ("arguments", "variables", "code", "words"),
    [
        (["--host", "0.0.0.0"], {}, 60, "can be reached from other machines"),
        (["--host", "::"], {"MEGABACK_SERVE_TOKEN": "short"}, 60, "16 or more"),
        (["--host", "192.0.2.1"], {"MEGABACK_SERVE_TOKEN": "x" * 20}, 60, "cannot listen"),
        (["--port", "{taken}"], {}, 60, "choose another --port"),
        (["--token", "abc"], {}, 2, "No such option"),
    ],
)
def test_a_model_that_cannot_be_served_is_one_error_message(
    run_megaback: Run,
    folder: Path,
    arguments: list[str],
    variables: dict[str, str],
    code: int,
    words: str,
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        words_typed = [argument.replace("{taken}", port) for argument in arguments]
        result = run_megaback("serve", folder, *words_typed, env={**os.environ, **variables})
    assert (result.returncode, words in result.stderr) == (code, True), result.stderr
    assert "Traceback" not in result.stderr


def test_a_folder_without_a_model_is_one_error_message(run_megaback: Run, tmp_path: Path) -> None:
    result = run_megaback("serve", tmp_path, "--port", "0")
    assert (result.returncode, len(result.stderr.splitlines())) == (40, 1)


@pytest.fixture(scope="module")
def slow_models(
    tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]
) -> tuple[Path, Path]:
    """Two models that need half a minute for a large infill, and milliseconds per token."""
    folder = tmp_path_factory.mktemp("slow")
    shape = ModelSection(num_layers=8, width=256, num_heads=4).resolved()
    found = [
        write_tiny_model(folder / direction.value, codec(direction), shape, 512)
        for direction in (Direction.BACKWARD, Direction.FORWARD)
    ]
    return found[0], found[1]


def test_an_infill_ends_soon_after_its_client_or_the_server(
    slow_models: tuple[Path, Path],
) -> None:
    backward, forward = slow_models
    body = {"beginning": "the last map " * 40, "ending": "a wooden clock " * 40}
    body |= {"candidates": 64, "max_tokens": 64, "temperature": 1.0, "seed": 1}
    limits = ["--max-seconds", 3, "--shutdown-seconds", 1]
    with started(backward, "--forward", forward, *limits) as (process, url):
        started_s = time.monotonic()
        answer = httpx.post(f"{url}/v1/infill", json=body, timeout=120)
        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "timeout")
        assert time.monotonic() - started_s < 12

        port = int(url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(posted(body, "/v1/infill"))
            wait_until(lambda: is_writing(url))
            time.sleep(2)  # During the join search that follows the samples.
        started_s = time.monotonic()
        small = {"prompt": "it.", "max_tokens": 1}
        assert httpx.post(f"{url}/v1/completions", json=small, timeout=60).status_code == 200
        assert time.monotonic() - started_s < 5

        with ThreadPoolExecutor(1) as pool:
            asking = pool.submit(httpx.post, f"{url}/v1/infill", json=body, timeout=120)
            wait_until(lambda: is_writing(url))
            started_s = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert asking.result().status_code == 503
            _, errors = process.communicate(timeout=60)
        assert (process.returncode, errors) == (0, "")
        assert time.monotonic() - started_s < 10


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_requests_past_the_shutdown_limit_get_their_partial_text_and_nothing_is_logged(
    slow_models: tuple[Path, Path], number: signal.Signals
) -> None:
    with started(slow_models[0], "--shutdown-seconds", 1 if number == signal.SIGTERM else 60) as (
        process,
        url,
    ):
        port = int(url.rsplit(":", 1)[1])
        body = {"prompt": "it.", "max_tokens": 4096, "ignore_eos": True, "n": 4}
        stalled = {**body, "stream": True, "stream_order": "writing", "logprobs": 20, "n": 2}
        kinds = [{}, {"stream": True}, {"stream": True, "stream_order": "writing"}]
        with (
            socket.create_connection(("127.0.0.1", port)) as reads_nothing,
            socket.create_connection(("127.0.0.1", port)) as sends_nothing,
            ThreadPoolExecutor(3) as pool,
        ):
            reads_nothing.sendall(posted(stalled))
            sends_nothing.sendall(posted(body)[:-5])
            asking = [
                pool.submit(httpx.post, f"{url}/v1/completions", json={**body, **kind}, timeout=120)
                for kind in kinds
            ]
            wait_until(lambda: num_running(url) == 14)
            time.sleep(0.5)
            started_s = time.monotonic()
            process.send_signal(number)
            if number == signal.SIGINT:  # a second signal ends the server immediately
                time.sleep(0.5)
                process.send_signal(number)
            whole, *streams = (one.result() for one in asking)
            _, errors = process.communicate(timeout=60)
        took_s = time.monotonic() - started_s
    assert took_s < 15
    is_interrupted = number == signal.SIGINT
    expected = (130, "megaback: interrupted\n") if is_interrupted else (0, "")
    assert (process.returncode, errors) == expected
    assert {choice["finish_reason"] for choice in whole.json()["choices"]} == {"length"}
    assert all(len(choice["text"]) > 5 for choice in whole.json()["choices"])
    for stream in streams:
        assert stream.text.endswith("data: [DONE]\n\n")
        assert stream.text.count('"finish_reason":"length"') == 4
