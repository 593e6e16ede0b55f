"""Compatibility with clients of OpenAI's API and of other servers."""

import json
from collections.abc import Callable, Iterator
from typing import Any

import httpx
import openai
import pytest

from data_pipeline.text.codec import TextCodec
from tests.helpers.server import Running, serving, tiny_models
from tools.serving import schemas
from tools.serving.completions import event_of
from tools.serving.models import ServedModel

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


@pytest.mark.parametrize(
    ("path", "model", "body"),
    [
        ("completions", schemas.CompletionRequest, {"prompt": "a", "max_tokens": 3, "seed": 1}),
        ("backchat", schemas.BackChatRequest, {"response": "a", "max_tokens": 3, "seed": 1}),
        ("score", schemas.ScoreRequest, {"texts": ["a"]}),
        (
            "chat/completions",
            schemas.ChatRequest,
            {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3, "seed": 1},
        ),
    ],
)
def test_null_means_the_default_of_every_optional_field(
    running: Running, path: str, model: type[schemas.Body], body: dict[str, Any]
) -> None:
    nulls = {name: None for name, one in model.model_fields.items() if not one.is_required()}
    plain, with_nulls = (
        running.post(f"/v1/{path}", sent).json() for sent in (body, {**nulls, **body})
    )
    for answer in (plain, with_nulls):
        answer.pop("id", None), answer.pop("created", None)
    assert with_nulls == plain
    described = running.get("/openapi.json").json()["components"]["schemas"][model.__name__]
    for name in nulls:
        assert {"type": "null"} in described["properties"][name]["anyOf"], name


def test_a_null_prompt_equals_an_empty_one(running: Running) -> None:
    body = {"max_tokens": 8, "seed": 3}
    texts = [
        running.post("/v1/completions", {**body, "prompt": prompt}).json()["choices"][0]["text"]
        for prompt in (None, "")
    ]
    assert texts[0] == texts[1] != ""


@pytest.mark.parametrize("name", ["tiny", "ahead"])
def test_prompt_ids_are_taken_in_the_models_order(
    client: openai.OpenAI, models: dict[str, ServedModel], name: str
) -> None:
    model = models[name]
    texts = ["the last map.", ENDING]
    ids = [model.codec.encode_document(text).tolist()[:-1] for text in texts]
    asked = {"model": name, "max_tokens": 1, "temperature": 0, "logprobs": 1, "echo": True}
    found = client.completions.create(prompt=ids, **asked)
    alone = client.completions.create(prompt=ids[1], **asked)
    assert found.choices[1].logprobs == alone.choices[0].logprobs
    assert found.usage is not None
    assert found.usage.prompt_tokens == sum(map(len, ids))
    for choice, text, given in zip(found.choices, texts, ids, strict=True):
        logprobs = choice.logprobs
        assert logprobs is not None
        assert logprobs.token_logprobs is not None
        assert logprobs.top_logprobs is not None
        # As lm_eval expects: one entry per prompt id, then one per new token.
        assert len(logprobs.token_logprobs) == len(given) + choice_tokens(choice)
        assert logprobs.token_logprobs[0] is logprobs.top_logprobs[0] is None
        written = client.completions.create(
            model=name, prompt=text, max_tokens=0, echo=True, logprobs=1
        ).choices[0]
        assert written.logprobs is not None
        assert logprobs.token_logprobs[1 : len(given)] == pytest.approx(
            written.logprobs.token_logprobs, abs=1e-4
        )
        assert choice.text.endswith(text) if name == "tiny" else choice.text.startswith(text)


def choice_tokens(choice: Any) -> int:
    return 0 if choice.finish_reason == "stop" else 1


def test_prompt_ids_beyond_the_context_are_rejected_or_truncated(running: Running) -> None:
    body = {"prompt": [7] * 500, "max_tokens": 1}
    refused = running.post("/v1/completions", body).json()["error"]
    assert (refused["param"], "shorten" in refused["message"]) == ("prompt", True)
    cut = running.post("/v1/completions", {**body, "truncate": True}).json()
    assert cut["usage"]["prompt_tokens"] == 32


def test_ignore_eos_and_min_tokens_set_the_fewest_tokens(running: Running) -> None:
    body = {"prompt": "a", "n": 32, "seed": 1, "top_k": -1, "temperature": 2.0}
    for more, fewest in (({"ignore_eos": True}, 40), ({"min_tokens": 25}, 25)):
        answer = running.post("/v1/completions", {**body, "max_tokens": 40, **more}).json()
        assert answer["usage"]["completion_tokens"] >= 32 * fewest
        if fewest == 40:
            assert {one["finish_reason"] for one in answer["choices"]} == {"length"}


def test_continuous_usage_stats_are_in_every_event(client: openai.OpenAI) -> None:
    chunks = list(
        client.completions.create(
            model="tiny",
            prompt=ENDING,
            max_tokens=9,
            seed=1,
            stream=True,
            stream_options={"include_usage": True, "continuous_usage_stats": True},  # type: ignore[typeddict-unknown-key]
            extra_body={"stream_order": "writing", "ignore_eos": True},
        )
    )
    usages = [chunk.usage for chunk in chunks]
    assert all(usages)
    counts = [usage.completion_tokens for usage in usages if usage]
    assert counts == sorted(counts)
    assert counts[-1] == 9
    assert chunks[-1].choices == []


@pytest.mark.parametrize("name", ["tiny", "ahead"])
def test_a_chat_completion_equals_backchat_whole_and_streamed(
    client: openai.OpenAI, name: str
) -> None:
    asked: dict[str, Any] = {
        "model": name,
        "messages": [{"role": "user", "content": [{"type": "text", "text": " a map "}]}],
        "max_completion_tokens": 12,
        "seed": 2,
        "n": 2,
    }
    whole = client.chat.completions.create(**asked)
    assert [one.message.role for one in whole.choices] == ["assistant"] * 2
    parts: dict[int, list[str]] = {0: [], 1: []}
    roles = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        for one in chunk.choices:
            parts[one.index].append(one.delta.content or "")
            roles += [one.delta.role] if one.delta.role else []
    assert ["".join(parts[index]) for index in (0, 1)] == [
        one.message.content for one in whole.choices
    ]
    assert roles == ["assistant"] * 2
    key = "response" if name == "tiny" else "instruction"
    body = {"model": name, key: "a map", "max_tokens": 12, "seed": 2, "n": 2}
    ranked = httpx.post(f"{client.base_url}backchat", json=body).json()["candidates"]
    assert {one["text"] for one in ranked} == {one.message.content for one in whole.choices}


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "a"}],
        [{"role": "user", "content": "a"}] * 2,
        [{"role": "system", "content": "Be kind."}],
    ],
)
def test_unsupported_chats_are_rejected_with_the_alternative(
    client: openai.OpenAI, messages: list[Any]
) -> None:
    with pytest.raises(openai.BadRequestError, match=r"one message.*/v1/backchat") as caught:
        client.chat.completions.create(model="tiny", messages=messages)
    assert caught.value.param == "messages"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"prompt": "a", "max_tokens": 10**6}, "max_tokens"),
        ({"prompt": "a", "min_tokens": 20}, "min_tokens"),
        ({"prompt": "a", "model": "gpt-5"}, "model"),
        ({"prompt": "a" * 500_000}, "prompt"),
        ({"prompt": "a", "stream_options": {"x": 1}}, "stream_options"),
        ({"prompt": "a", "n": 0}, "n"),
        ({}, "prompt"),
    ],
)
def test_an_error_names_its_field(running: Running, body: dict[str, Any], param: str) -> None:
    answer = running.post("/v1/completions", body)
    assert answer.status_code in (400, 404)
    assert answer.json()["error"]["param"] == param


def test_an_event_is_one_line_for_any_definition_of_lines() -> None:
    text = "a\u2028b\u2029c\x85d\ne\x0bf\x1cg"
    event = event_of(json.dumps({"text": text}, ensure_ascii=False))
    assert len(event.strip().splitlines()) == 1
    assert json.loads(event.removeprefix("data: "))["text"] == text


def test_unicode_line_breaks_round_trip(running: Running) -> None:
    prompt = "x\u2028y\u2029z\x85."
    body = {"prompt": prompt, "max_tokens": 0, "echo": True, "stream": True}
    lines = running.post("/v1/completions", body).text.splitlines()
    events = [
        json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")
    ]
    assert "".join(one["choices"][0]["text"] for one in events) == prompt


def test_openapi_describes_bearer_authentication(models: dict[str, ServedModel]) -> None:
    for token, needed in ((None, [{}, {"token": []}]), ("0123456789abcdef", [{"token": []}])):
        with serving(models, token=token) as running:
            described = running.get("/openapi.json").json()
        scheme = {"type": "http", "scheme": "bearer"}
        assert described["components"]["securitySchemes"] == {"token": scheme}
        assert described["security"] == needed
