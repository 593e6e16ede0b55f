"""`megaback serve` as a process: how it starts, who it lets in, how it ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from serve_helpers import write_tiny_model

from data_pipeline.text import TextCodec

Run = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, codec: Callable[..., TextCodec]) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("models") / "tiny", codec())


@contextmanager
def started(*arguments: object, **variables: str) -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A server's process and where it listens."""
    command = [sys.executable, "-m", "megaback", "serve", *map(str, arguments), "--port", "0"]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **variables},
    ) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            assert "http://" in line, process.stderr and process.stderr.read()
            yield process, line.split()[1].replace("0.0.0.0", "127.0.0.1")
        finally:
            process.kill()


def is_writing(url: str) -> bool:
    lines = httpx.get(f"{url}/metrics", timeout=60).text.splitlines()
    return any(line.startswith("megaback_samples_running") and line[-3:] != "0.0" for line in lines)


def test_sigterm_finishes_what_runs_and_leaves_with_peace(folder: Path) -> None:
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
def test_what_cannot_be_served_is_one_sentence(
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


def test_a_folder_without_a_model_is_one_sentence(run_megaback: Run, tmp_path: Path) -> None:
    result = run_megaback("serve", tmp_path, "--port", "0")
    assert (result.returncode, len(result.stderr.splitlines())) == (40, 1)
