"""The server, over real sockets: what OpenAI's own client gets, and what nobody gets."""

import json
import re
import socket
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import httpx
import openai
import psutil
import pytest
from serve_helpers import CONTEXT_TOKENS, Running, serving, tiny_models

from data_pipeline.text import TextCodec
from megaback.choice import SamplingOptions
from megaback.generate import complete, generate
from megaback.infill import InfillOptions
from tools.serving.connections import ImpatientConnection
from tools.serving.guard import Limits
from tools.serving.models import ServedModel, load_meeting

Codecs = Callable[..., TextCodec]

ENDING = "and said nothing about it."
TOKEN = "a-token-of-more-than-16"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, codec: Codecs) -> dict[str, ServedModel]:
    return tiny_models(tmp_path_factory.mktemp("serve"), codec)


@pytest.fixture(scope="module")
def running(models: dict[str, ServedModel]) -> Iterator[Running]:
    with serving(models) as running:
        yield running


@pytest.fixture(scope="module")
def client(running: Running) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def alone(
    models: dict[str, ServedModel], name: str, given: str, tokens: int, **options: object
) -> str:
    """What is written for one text without a server, with what was given."""
    model = models[name]
    chosen = SamplingOptions(tokens, **{"temperature": 1.0, "top_k": 0, **options})
    return complete(model.sampler, model.codec, given, CONTEXT_TOKENS, chosen)


@pytest.fixture(scope="module")
def endless(models: dict[str, ServedModel]) -> str:
    """A prompt for which greedy writing does not end soon."""
    model = models["tiny"]
    for number in range(100):
        prompt = model.codec.prompt(f"{number} maps.")
        options = SamplingOptions(1000, temperature=0)
        new_ids = generate(model.sampler, model.codec, prompt, CONTEXT_TOKENS, options)
        if sum(1 for _ in new_ids) == 1000:
            return f"{number} maps."
    raise AssertionError


def as_sent(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


@pytest.mark.parametrize("name", ["tiny", "ahead"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_openais_client_streams_what_it_gets_at_once(
    client: openai.OpenAI, models: dict[str, ServedModel], name: str, seed: int
) -> None:
    asked = {"model": name, "prompt": ENDING, "max_tokens": 40, "seed": seed}
    whole = client.completions.create(**asked).choices[0]
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    written = [ENDING, whole.text] if name == "ahead" else [whole.text, ENDING]
    assert "".join(written) == as_sent(alone(models, name, ENDING, 40, seed=seed))


def test_in_the_order_of_writing_each_chunk_stands_before_those_before_it(
    client: openai.OpenAI,
) -> None:
    asked = {"model": "tiny", "prompt": ENDING, "max_tokens": 40, "seed": 5}
    whole = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(**asked, stream=True, extra_body={"stream_order": "writing"})
    parts = [chunk.choices[0].text for chunk in stream]
    assert len(parts) > 10
    assert "".join(reversed(parts)) == whole


def test_greedy_samples_written_together_are_those_written_alone(
    running: Running, models: dict[str, ServedModel]
) -> None:
    endings = [f"{word} {number}." for number in range(12) for word in ("in the autumn of", "the")]

    def ask(ending: str) -> str:
        body = {"prompt": ending, "max_tokens": 30, "temperature": 0, "echo": True}
        return str(running.post("/v1/completions", body).json()["choices"][0]["text"])

    with ThreadPoolExecutor(len(endings)) as pool:
        together = list(pool.map(ask, endings))
    assert together == [
        as_sent(alone(models, "tiny", ending, 30, temperature=0)) for ending in endings
    ]


def test_several_prompts_and_samples_are_numbered_as_openai_does(
    client: openai.OpenAI, models: dict[str, ServedModel]
) -> None:
    prompts = ["the last map.", "a wooden clock."]
    found = client.completions.create(
        model="tiny", prompt=prompts, n=2, max_tokens=6, seed=7, echo=True
    )
    assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
    assert [choice.text for choice in found.choices] == [
        as_sent(alone(models, "tiny", prompts[index // 2], 6, seed=7 + index)) for index in range(4)
    ]
    assert found.usage is not None
    assert found.usage.total_tokens == found.usage.prompt_tokens + found.usage.completion_tokens


@pytest.mark.parametrize("is_streamed", [True, False])
def test_a_stop_text_ends_a_sample_before_it(client: openai.OpenAI, is_streamed: bool) -> None:
    asked = {"model": "tiny", "prompt": ENDING, "max_tokens": 60, "seed": 2}
    free = client.completions.create(**asked).choices[0].text
    stop = free[len(free) // 2 : len(free) // 2 + 2]
    if is_streamed:
        chunks = list(client.completions.create(**asked, stop=stop, stream=True))
        text, reason = "".join(c.choices[0].text for c in chunks), chunks[-1].choices[0]
        assert reason.finish_reason == "stop"
    else:
        choice = client.completions.create(**asked, stop=[stop, "\x00"]).choices[0]
        text = choice.text
        assert choice.finish_reason == "stop"
    assert text == free[free.rindex(stop) + len(stop) :]


@pytest.mark.parametrize("name", ["tiny", "ahead"])
def test_log_probabilities_come_with_their_places_at_once_and_streamed(
    client: openai.OpenAI, models: dict[str, ServedModel], name: str
) -> None:
    asked = {"model": name, "prompt": ENDING, "max_tokens": 20, "seed": 4, "logprobs": 3}
    whole = client.completions.create(**asked).choices[0]
    told = whole.logprobs
    assert told is not None
    assert told.tokens
    assert told.top_logprobs
    assert told.text_offset
    assert all(3 <= len(top) <= 4 for top in told.top_logprobs)
    stream = client.completions.create(**asked, stream=True, extra_body={"stream_order": "writing"})
    streamed: list[str] = []
    for chunk in stream:
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.tokens or []
    assert streamed == told.tokens
    text, start = (
        (whole.text + ENDING, len(whole.text)) if name == "tiny" else (ENDING + whole.text, 0)
    )
    for token, offset in zip(told.tokens, told.text_offset, strict=True):
        if not token.startswith("bytes:") and "�" not in whole.text:
            assert text[start + offset :].startswith(token) or token.endswith(text[:1])


def test_a_prompts_own_probabilities_are_what_score_says(running: Running) -> None:
    body = {"prompt": "the last map.", "max_tokens": 0, "echo": True, "logprobs": 1}
    choice = running.post("/v1/completions", body).json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("the last map.", "length")
    assert choice["logprobs"]["text_offset"] == sorted(
        choice["logprobs"]["text_offset"], reverse=True
    )
    assert choice["logprobs"]["text_offset"][-1] == 0
    (score,) = running.post("/v1/score", {"texts": ["the last map."]}).json()["scores"]
    without_end = sum(choice["logprobs"]["token_logprobs"])
    assert score["tokens"] == len(choice["logprobs"]["tokens"]) + 1
    assert score["log_probability"] < without_end < 0


def test_backchat_ranks_what_it_wrote_by_what_score_says(running: Running) -> None:
    body = {"response": "a map", "n": 16, "max_tokens": 40, "seed": 1}
    found = running.post("/v1/backchat", body).json()["candidates"]
    ended = [one for one in found if one["is_complete"]]
    assert len(ended) > 0
    assert found[: len(ended)] == ended
    likelihoods = [one["log_probability"] for one in ended]
    assert likelihoods == sorted(likelihoods, reverse=True)
    for one in ended:
        texts = {"response": "a map", "texts": [one["text"]]}
        (score,) = running.post("/v1/score", texts).json()["scores"]
        # The same text may be written in other ids than those in which it is encoded.
        if score["tokens"] == one["tokens"]:
            assert score["log_probability"] == pytest.approx(one["log_probability"], abs=1e-3)
    assert running.post("/v1/backchat", {"instruction": "Who?"}).status_code == 400
    forward = {"model": "ahead", "instruction": "Who?", "max_tokens": 4}
    assert running.post("/v1/backchat", forward).json()["candidates"]


def test_models_say_in_which_direction_they_write(client: openai.OpenAI) -> None:
    found = {model.id: model.model_dump()["direction"] for model in client.models.list()}
    assert found == {"tiny": "backward", "ahead": "forward"}
    assert client.models.retrieve("ahead").id == "ahead"
    with pytest.raises(openai.NotFoundError, match="tiny, ahead"):
        client.completions.create(model="gpt-5", prompt="x")


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "not JSON"),
        (b'{"prompt": "\xff\xfe"}', 400, "parsing"),
        (b"[" * 5000, 400, ""),
        (b'{"prompt": NaN}', 400, "prompt"),
        (b"null", 400, "body"),
        (b'{"prompt": "a", "temperature": 1e999}', 400, "temperature"),
        (b'{"prompt": "a", "temprature": 1}', 400, "temprature"),
        (b'{"prompt": "a", "best_of": 3}', 400, "best_of"),
        (b'{"prompt": "a", "logit_bias": {"5": 1}}', 400, "logit_bias"),
        (b'{"prompt": "a", "max_tokens": 999999}', 400, "max_tokens"),
        (b'{"prompt": "a", "n": 64, "model": "\\ud800"}', 404, "tiny"),
        (b'{"prompt": [], "n": 1}', 400, "prompt"),
        (b'{"prompt": [1, 2]}', 400, "prompt"),
        (b'{"prompt": "a", "seed": -1}', 400, "seed"),
        (b'{"prompt": "a", "stop": ""}', 400, "stop"),
        (json.dumps({"prompt": "a map " * 60}).encode(), 400, "shorten"),
        (json.dumps({"prompt": "a" * 500_000}).encode(), 400, "shorten"),
        (json.dumps({"prompt": ["a"] * 33, "n": 2}).encode(), 400, "more than"),
    ],
)
def test_what_makes_no_sense_is_refused_in_a_sentence(
    running: Running, body: bytes, status: int, words: str
) -> None:
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers=headers)
    assert answer.status_code == status, answer.text
    assert words in answer.json()["error"]["message"]


@pytest.mark.parametrize("name", ["tiny", "ahead"])
def test_of_a_long_prompt_the_near_part_can_be_read(running: Running, name: str) -> None:
    near, far = "the last map ", "a wooden clock " * 60
    prompt = near * 20 + far if name == "tiny" else far + near * 20
    asked = {"model": name, "max_tokens": 8, "temperature": 0, "truncate": True}
    long = running.post("/v1/completions", {**asked, "prompt": prompt}).json()["choices"][0]
    other = prompt.replace("clock", "lantern")
    again = running.post("/v1/completions", {**asked, "prompt": other}).json()["choices"][0]
    assert long == again
    assert long["text"]


def test_lone_surrogates_are_read_and_come_back_as_replacements(running: Running) -> None:
    body = b'{"prompt": "a\\ud800b", "max_tokens": 2, "echo": true, "logprobs": 2, "seed": 1}'
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers=headers)
    assert answer.json()["choices"][0]["text"].endswith("a�b")


def test_ten_megabytes_are_refused_and_leave_no_memory_behind(running: Running) -> None:
    body = json.dumps({"prompt": "word " * 2_000_000})
    before = psutil.Process().memory_info().rss
    for _ in range(5):
        answer = httpx.post(f"{running.url}/v1/completions", content=body, timeout=30)
        assert answer.status_code == 413
    chunks = (b"x" * 65536 for _ in range(160))  # without a Content-Length
    assert httpx.post(f"{running.url}/v1/score", content=chunks).status_code == 413
    assert psutil.Process().memory_info().rss - before < 60 << 20


def test_who_hangs_up_frees_the_place(running: Running, endless: str) -> None:
    body = {"prompt": endless, "max_tokens": 4096, "n": 8, "temperature": 0, "stream": True}
    body |= {"stream_order": "writing"}
    with httpx.stream("POST", f"{running.url}/v1/completions", json=body) as answer:
        lines = answer.iter_lines()  # forgotten, it closes the connection
        next(lines)
        wait_until(lambda: metric(running, "samples_running", "tiny") == 8)
    wait_until(lambda: metric(running, "samples_running", "tiny") == 0)
    request = httpx.Request("POST", f"{running.url}/v1/completions", json={**body, "stream": False})
    with pytest.raises(httpx.ReadTimeout):
        httpx.Client(timeout=0.5).send(request)
    wait_until(lambda: metric(running, "samples_running", "tiny") == 0)
    assert metric(running, "requests_given_up_total") >= 2


def metric(running: Running, name: str, model: str | None = None) -> float:
    label = f'{{model="{model}"}}' if model else ""
    found = re.search(
        rf"^megaback_{name}{re.escape(label)} (\S+)$", running.get("/metrics").text, re.MULTILINE
    )
    assert found, name
    return float(found.group(1))


def wait_until(is_so: Callable[[], bool], most_s: float = 20) -> None:
    ends_s = time.monotonic() + most_s
    while not is_so():
        assert time.monotonic() < ends_s
        time.sleep(0.05)


def test_a_thousand_connections_that_are_left_open_keep_nobody_out(running: Running) -> None:
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
        assert open_now <= ImpatientConnection.most_connections + 5
    finally:
        for connection in left:
            connection.close()


def test_a_connection_without_a_request_is_closed(
    models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ImpatientConnection, "seconds_for_a_request", 0.3)
    with serving(models) as running:
        port = int(running.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            for letter in b"GET":
                connection.sendall(bytes([letter]))
                time.sleep(0.05)
            with suppress(ConnectionResetError):
                assert connection.recv(100) == b""


def test_a_token_is_asked_for_where_there_is_one(models: dict[str, ServedModel]) -> None:
    with serving(models, token=TOKEN, is_loopback=False) as running:
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


@pytest.mark.parametrize(
    "headers", [{"host": "evil.example"}, {"origin": "https://evil.example"}, {"origin": "null"}]
)
def test_a_page_of_another_site_is_refused(running: Running, headers: dict[str, str]) -> None:
    assert running.get("/v1/models", headers=headers).status_code == 403


def test_beyond_the_limits_clients_are_told_to_come_again(
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
        # Time was up; what was written by then is the answer.
        (first, *_) = [answer for answer in answers if answer.status_code == 200]
        assert {choice["finish_reason"] for choice in first.json()["choices"]} == {"length"}


def test_a_body_that_does_not_come_is_not_waited_for(models: dict[str, ServedModel]) -> None:
    with serving(models, replace(Limits(), body_s=0.3)) as running:
        port = int(running.url.rsplit(":", 1)[1])
        with socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(
                b"POST /v1/score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"
            )
            assert b" 408 " in connection.recv(1000)


def test_every_answer_has_a_strict_policy(running: Running) -> None:
    for path in ("/", "/v1/models", "/nowhere"):
        policy = running.get(path).headers["content-security-policy"]
        assert policy.startswith("default-src 'none'")
        assert "unsafe" not in policy
    assert running.get("/../../setup.py").status_code == 404
    assert running.get("/%2e%2e/app.py").status_code == 404


def test_a_sample_that_fails_is_an_answer_and_the_server_lives(
    running: Running, models: dict[str, ServedModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no memory")

    body = {"prompt": "a", "max_tokens": 3}
    with monkeypatch.context() as patch:
        patch.setattr(models["tiny"].sampler, "step", broken)
        answer = running.post("/v1/completions", body)
        assert (answer.status_code, answer.json()["error"]["type"]) == (500, "server_error")
    assert running.post("/v1/completions", body).status_code == 200


def test_metrics_count_tokens(running: Running) -> None:
    before = metric(running, "written_tokens_total", "tiny")
    usage = running.post("/v1/completions", {"prompt": "a", "max_tokens": 9, "seed": 1}).json()
    after = metric(running, "written_tokens_total", "tiny")
    assert after - before == usage["usage"]["completion_tokens"]
    assert "megaback_step_seconds_bucket" in running.get("/metrics").text


def test_a_model_of_the_wrong_direction_is_refused_as_forward(
    models: dict[str, ServedModel],
    tmp_path: Path,
    codec: Codecs,
    run_megaback: Callable[..., object],
) -> None:
    from click.testing import CliRunner
    from serve_helpers import write_tiny_model

    from tools.serve import main

    folder = write_tiny_model(tmp_path / "back", codec())
    result = CliRunner().invoke(main, [str(folder), "--forward", str(folder), "--port", "0"])
    assert (result.exit_code, "writes backward" in result.stderr) == (33, True)


def test_a_middle_is_what_both_models_write_between(
    models: dict[str, ServedModel], running: Running, tmp_path: Path, codec: Codecs
) -> None:
    body = {"beginning": "the old", "ending": "the last map.", "candidates": 3, "max_tokens": 6}
    assert running.post("/v1/infill", body).status_code == 400
    tiny_models(tmp_path, codec)
    infiller = load_meeting(tmp_path / "tiny", tmp_path / "ahead", "cpu")
    assert infiller is not None
    with serving(models, infiller=infiller) as meeting:
        assert all(one["can_infill"] for one in meeting.get("/v1/models").json()["data"])
        found = meeting.post("/v1/infill", {**body, "seed": 4, "n": 2}).json()["infills"]
    options = InfillOptions(
        6, forward_candidates=3, backward_candidates=3, rescored=3, sampling=SamplingOptions(seed=4)
    )
    expected = infiller.fill("the old", "the last map.", options)[:2]
    assert [one["middle"] for one in found] == [as_sent(one.middle) for one in expected]
    assert load_meeting(tmp_path / "tiny", tmp_path / "tiny", "cpu") is None
