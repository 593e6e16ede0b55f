"""`megaback serve` over real sockets, with OpenAI's own client."""

import subprocess
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import openai
import pytest

from data_pipeline.text.codec import TextCodec
from megaback.inference.generate import complete
from megaback.inference.infill.infiller import InfillOptions
from megaback.inference.sampling import SamplingOptions
from tests.helpers.server import CONTEXT_TOKENS, Running, metric, serving, tiny_models
from tools.serving.models import ServedModel, load_meeting

Codecs = Callable[..., TextCodec]

ENDING = "and said nothing about it."


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
    """`given` with the text that is generated for it without a server."""
    model = models[name]
    chosen = SamplingOptions(tokens, **{"temperature": 1.0, "top_k": 0, **options})
    return complete(model.decoder, model.codec, given, CONTEXT_TOKENS, chosen)


def as_sent(text: str) -> str:
    return text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")


@pytest.mark.parametrize("name", ["tiny", "ahead"])
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_openais_client_gets_the_same_text_streamed_and_whole(
    client: openai.OpenAI, models: dict[str, ServedModel], name: str, seed: int
) -> None:
    asked = {"model": name, "prompt": ENDING, "max_tokens": 40, "seed": seed}
    whole = client.completions.create(**asked).choices[0]
    chunks = list(client.completions.create(**asked, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.text
    assert chunks[-1].choices[0].finish_reason == whole.finish_reason
    written = [ENDING, whole.text] if name == "ahead" else [whole.text, ENDING]
    assert "".join(written) == as_sent(alone(models, name, ENDING, 40, seed=seed))


def test_chunks_in_writing_order_are_prepended(
    client: openai.OpenAI,
) -> None:
    asked = {"model": "tiny", "prompt": ENDING, "max_tokens": 40, "seed": 5}
    whole = client.completions.create(**asked).choices[0].text
    stream = client.completions.create(**asked, stream=True, extra_body={"stream_order": "writing"})
    parts = [chunk.choices[0].text for chunk in stream]
    assert len(parts) > 10
    assert "".join(reversed(parts)) == whole


def test_batched_greedy_samples_equal_single_ones(
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


def test_choices_of_several_prompts_are_indexed_as_by_openai(
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
def test_a_stop_text_is_excluded_from_the_sample(client: openai.OpenAI, is_streamed: bool) -> None:
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
def test_log_probabilities_have_offsets_and_are_the_same_streamed(
    client: openai.OpenAI, models: dict[str, ServedModel], name: str
) -> None:
    asked = {"model": name, "prompt": ENDING, "max_tokens": 20, "seed": 4, "logprobs": 3}
    whole = client.completions.create(**asked).choices[0]
    logprobs = whole.logprobs
    assert logprobs is not None
    assert logprobs.tokens
    assert logprobs.top_logprobs
    assert logprobs.text_offset
    assert all(3 <= len(top) <= 4 for top in logprobs.top_logprobs)
    stream = client.completions.create(**asked, stream=True, extra_body={"stream_order": "writing"})
    streamed: list[str] = []
    for chunk in stream:
        if chunk.choices[0].logprobs:
            streamed += chunk.choices[0].logprobs.tokens or []
    assert streamed == logprobs.tokens
    text, start = (
        (whole.text + ENDING, len(whole.text)) if name == "tiny" else (ENDING + whole.text, 0)
    )
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:") and "�" not in whole.text:
            assert text[start + offset :].startswith(token) or token.endswith(text[:1])


def test_an_echoed_prompt_has_the_log_probabilities_of_score(running: Running) -> None:
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


def test_backchat_ranks_candidates_by_their_score(running: Running) -> None:
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
        # The sampled ids may differ from the encoding of the same text.
        if score["tokens"] == one["tokens"]:
            assert score["log_probability"] == pytest.approx(one["log_probability"], abs=1e-3)
    assert running.post("/v1/backchat", {"instruction": "Who?"}).status_code == 400
    forward = {"model": "ahead", "instruction": "Who?", "max_tokens": 4}
    assert running.post("/v1/backchat", forward).json()["candidates"]


def test_models_have_a_direction(client: openai.OpenAI) -> None:
    found = {model.id: model.model_dump()["direction"] for model in client.models.list()}
    assert found == {"tiny": "backward", "ahead": "forward"}
    assert client.models.retrieve("ahead").id == "ahead"
    with pytest.raises(openai.NotFoundError, match="tiny, ahead"):
        client.completions.create(model="gpt-5", prompt="x")


@pytest.mark.parametrize("name", ["tiny", "ahead"])
def test_truncate_keeps_the_near_part_of_a_long_prompt(running: Running, name: str) -> None:
    near, far = "the last map ", "a wooden clock " * 60
    prompt = near * 20 + far if name == "tiny" else far + near * 20
    asked = {"model": name, "max_tokens": 8, "temperature": 0, "truncate": True}
    long = running.post("/v1/completions", {**asked, "prompt": prompt}).json()["choices"][0]
    other = prompt.replace("clock", "lantern")
    again = running.post("/v1/completions", {**asked, "prompt": other}).json()["choices"][0]
    assert long == again
    assert long["text"]


def test_lone_surrogates_are_returned_as_replacement_characters(running: Running) -> None:
    body = b'{"prompt": "a\\ud800b", "max_tokens": 2, "echo": true, "logprobs": 2, "seed": 1}'
    headers = {"content-type": "application/json"}
    answer = httpx.post(f"{running.url}/v1/completions", content=body, headers=headers)
    assert answer.json()["choices"][0]["text"].endswith("a�b")


def test_metrics_count_new_tokens(running: Running) -> None:
    before = metric(running, "written_tokens_total", "tiny")
    usage = running.post("/v1/completions", {"prompt": "a", "max_tokens": 9, "seed": 1}).json()
    after = metric(running, "written_tokens_total", "tiny")
    assert after - before == usage["usage"]["completion_tokens"]
    assert "megaback_step_seconds_bucket" in running.get("/metrics").text


def test_a_backward_model_is_rejected_as_forward(
    tmp_path: Path, codec: Codecs, run_megaback: Callable[..., "subprocess.CompletedProcess[str]"]
) -> None:
    from tests.helpers.server import write_tiny_model

    folder = write_tiny_model(tmp_path / "back", codec())
    done = run_megaback("serve", folder, "--forward", folder, "--port", 0)
    assert (done.returncode, "writes backward" in done.stderr) == (33, True)


def test_infill_equals_the_infiller(
    models: dict[str, ServedModel], running: Running, tmp_path: Path, codec: Codecs
) -> None:
    body = {"beginning": "the old", "ending": "the last map.", "candidates": 3, "max_tokens": 6}
    assert running.post("/v1/infill", body).status_code == 400
    infiller = load_meeting(tiny_models(tmp_path, codec))
    assert infiller is not None
    with serving(models, infiller=infiller) as meeting:
        assert all(one["can_infill"] for one in meeting.get("/v1/models").json()["data"])
        found = meeting.post("/v1/infill", {**body, "seed": 4, "n": 2}).json()["infills"]
        many = meeting.post("/v1/infill", {**body, "candidates": 64, "max_tokens": 65})
        assert many.status_code == 400
        assert "is 4160; the limit is 4096" in many.json()["error"]["message"]
    options = InfillOptions(
        6, forward_candidates=3, backward_candidates=3, rescored=3, sampling=SamplingOptions(seed=4)
    )
    expected = infiller.fill("the old", "the last map.", options)[:2]
    assert [one["middle"] for one in found] == [as_sent(one.middle) for one in expected]
    assert load_meeting({"tiny": models["tiny"], "other": models["tiny"]}) is None
