"""Deadlines, cancellation on disconnect and shutdown, and the limit of waiting samples."""

import json
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

from data_pipeline.text.codec import TextCodec
from megaback.inference.decoder import Decoder
from megaback.inference.infill.infiller import Infiller
from megaback.inference.steps import Steps
from tests.helpers.server import (
    endless_prompt,
    metric,
    posted,
    raw,
    serving,
    tiny_models,
    wait_until,
)
from tools.serving.models import ServedModel, load_meeting
from tools.serving.request_limits import Limits

Codecs = Callable[..., TextCodec]

INFILL = {"beginning": "the old", "ending": "the last map.", "candidates": 3, "max_tokens": 6}
ECHO = {"prompt": ["a map", "the last map."], "echo": True, "logprobs": 1, "max_tokens": 2}
LONG = {"max_tokens": 4096, "temperature": 0}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[str, ServedModel]:
    return tiny_models(tmp_path_factory.mktemp("serve"), codec)


@pytest.fixture(scope="module")
def infiller(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> Infiller:
    found = load_meeting(tiny_models(tmp_path_factory.mktemp("meeting"), codec))
    assert found is not None
    return found


@pytest.fixture(scope="module")
def endless(models: dict[str, ServedModel]) -> str:
    return endless_prompt(models["tiny"])


class Endless:
    """Endless steps that replace the computation of a request."""

    def __init__(self) -> None:
        self.is_begun, self.is_ended = threading.Event(), threading.Event()

    def steps(self, *_arguments: object) -> Steps[Any]:
        self.is_begun.set()
        try:
            while True:
                time.sleep(0.005)
                yield
        finally:
            self.is_ended.set()


@pytest.fixture(
    params=[
        (Infiller, "meet_steps", "infill", INFILL),
        (Decoder, "score_steps", "score", {"texts": ["a map", "the last map."]}),
        (Decoder, "score_steps", "completions", ECHO),
        (Decoder, "score_steps", "completions", {**ECHO, "stream": True}),
    ],
    ids=["infill", "score", "echo", "echo in a stream"],
)
def work(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> tuple[Endless, str, dict[str, Any]]:
    owner, name, path, body = request.param
    endless = Endless()
    monkeypatch.setattr(owner, name, endless.steps)
    return endless, f"/v1/{path}", body


def test_every_computation_has_a_deadline(
    models: dict[str, ServedModel], infiller: Infiller, work: tuple[Endless, str, dict[str, Any]]
) -> None:
    endless, path, body = work
    with serving(models, Limits(request_s=0.4), infiller=infiller) as running:
        started_s = time.monotonic()
        answer = running.post(path, body)
        assert time.monotonic() - started_s < 15
        assert answer.status_code == 503
        assert "limit of 0.4 s" in answer.json()["error"]["message"]
        assert (answer.headers["retry-after"], answer.headers["x-should-retry"]) == ("30", "false")
        assert endless.is_ended.wait(10)


def test_a_disconnect_cancels_the_computation_and_other_requests_are_answered_meanwhile(
    models: dict[str, ServedModel], infiller: Infiller, work: tuple[Endless, str, dict[str, Any]]
) -> None:
    endless, path, body = work
    plain = {"prompt": "a", "max_tokens": 20, "ignore_eos": True}
    with serving(models, infiller=infiller) as running:
        with raw(running, posted(body, path)):
            assert endless.is_begun.wait(30)
            assert running.post("/v1/completions", plain).status_code == 200
            assert not endless.is_ended.is_set()
        assert endless.is_ended.wait(10)
        wait_until(lambda: metric(running, "requests_given_up_total") == 1)


def test_shutdown_cancels_every_computation(
    models: dict[str, ServedModel], infiller: Infiller, work: tuple[Endless, str, dict[str, Any]]
) -> None:
    endless, path, body = work
    with (
        ThreadPoolExecutor(1) as pool,
        serving(models, infiller=infiller, shutdown_s=0.3) as running,
    ):
        asking = pool.submit(running.post, path, body)
        assert endless.is_begun.wait(30)
        running.server.should_exit = True
        answer = asking.result(20)
        assert (answer.status_code, answer.headers["retry-after"]) == (503, "1")
        assert "shutting down" in answer.json()["error"]["message"]
        assert endless.is_ended.wait(10)


@pytest.mark.parametrize("order", ["reading", "writing"])
def test_a_stream_gets_its_partial_text_at_shutdown(
    models: dict[str, ServedModel], endless: str, order: str
) -> None:
    body = {**LONG, "prompt": endless, "n": 3, "stream": True, "stream_order": order}
    with (
        serving(models, shutdown_s=0.5) as running,
        httpx.stream("POST", f"{running.url}/v1/completions", json=body, timeout=60) as answer,
    ):
        wait_until(lambda: metric(running, "written_tokens_total", "tiny") > 30)
        running.server.should_exit = True
        events = [line[6:] for line in answer.iter_lines() if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    choices = [choice for event in events[:-1] for choice in json.loads(event)["choices"]]
    for index in range(3):
        parts = [choice for choice in choices if choice["index"] == index]
        assert len("".join(part["text"] for part in parts)) > 10
        assert parts[-1]["finish_reason"] == "length"


def test_a_sample_that_never_starts_is_a_timeout_error(
    models: dict[str, ServedModel], endless: str
) -> None:
    long = {**LONG, "prompt": endless, "n": 8}
    with serving(models) as running, raw(running, posted(long)), ThreadPoolExecutor(2) as pool:
        wait_until(lambda: metric(running, "samples_running", "tiny") == 8)
        running.service.limits = Limits(request_s=0.5)
        asked = [{**long, "n": 1, "stream": stream} for stream in (False, True)]
        plain, stream = pool.map(lambda body: running.post("/v1/completions", body), asked)
        assert plain.status_code == 503
        assert "limit of 0.5 s" in plain.json()["error"]["message"]
        # Its headers were sent when it was queued.
        assert stream.status_code == 200
        assert json.loads(stream.text.removeprefix("data: "))["error"]["code"] == "timeout"


def test_samples_beyond_the_waiting_limit_are_rejected_before_any_header(
    models: dict[str, ServedModel], infiller: Infiller, endless: str
) -> None:
    long = {**LONG, "prompt": endless, "n": 12}
    limits = Limits(waiting_samples=4)
    message = {"messages": [{"role": "user", "content": "a"}]}
    with serving(models, limits, infiller=infiller) as running, raw(running, posted(long)):
        wait_until(lambda: metric(running, "samples_waiting", "tiny") == 4)
        for path, body in (
            ("completions", {"prompt": "a"}),
            ("completions", {"prompt": "a", "stream": True}),
            ("chat/completions", message),
            ("chat/completions", {**message, "stream": True}),
            ("backchat", {"response": "a"}),
            ("infill", INFILL),
        ):
            answer = running.post(f"/v1/{path}", body)
            assert (answer.status_code, answer.headers["retry-after"]) == (503, "1"), path
            assert "are waiting already" in answer.json()["error"]["message"]
        # The samples of the model with free slots are canceled too.
        wait_until(lambda: metric(running, "samples_running", "ahead") == 0)
