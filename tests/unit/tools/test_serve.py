"""The server, over real sockets: what OpenAI's own client gets, and what nobody gets."""

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
    """What is written for one text without a server, with what was given."""
    model = models[name]
    chosen = SamplingOptions(tokens, **{"temperature": 1.0, "top_k": 0, **options})
    return complete(model.decoder, model.codec, given, CONTEXT_TOKENS, chosen)


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

    from tests.helpers.server import write_tiny_model
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
        many = meeting.post("/v1/infill", {**body, "candidates": 64, "max_tokens": 65})
        assert many.status_code == 400
        assert "is 4160; the limit is 4096" in many.json()["error"]["message"]
    options = InfillOptions(
        6, forward_candidates=3, backward_candidates=3, rescored=3, sampling=SamplingOptions(seed=4)
    )
    expected = infiller.fill("the old", "the last map.", options)[:2]
    assert [one["middle"] for one in found] == [as_sent(one.middle) for one in expected]
    assert load_meeting(tmp_path / "tiny", tmp_path / "tiny", "cpu") is None
