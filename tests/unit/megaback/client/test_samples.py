"""Samples in several requests: the constraint of the first id, minimum lengths, full contexts."""

from collections.abc import Callable, Generator
from dataclasses import replace
from typing import Any

import pytest

from data_pipeline.errors import (
    ConfigError,
    MegabackError,
    PromptError,
    ServeError,
    TokenizerMismatchError,
)
from data_pipeline.text.codec import TextCodec
from megaback.client.connection import Connection
from megaback.client.samples import sampled_ids
from megaback.client.servers import LlamaCppServer, ModelServer, Request, VllmServer, connect
from megaback.inference.sampling import SamplingOptions

Codecs = Callable[..., TextCodec]
CONTEXT_TOKENS = 16
OPTIONS = SamplingOptions(max_new_tokens=30, temperature=0)


class Counting(ModelServer):
    """A server whose model writes the allowed id that follows the last one."""

    kind = "counting"
    min_temperature = 0.01

    def __init__(self, at_once: int | None, ends_after: int | None = None) -> None:
        super().__init__(Connection("http://127.0.0.1:1"), "counting", CONTEXT_TOKENS)
        self.tokens_at_once = at_once  # type: ignore[misc]
        self.asked: list[Request] = []
        self._ends_after = ends_after

    def _new_ids(self, request: Request) -> Generator[list[int], None, None]:
        assert len(request.ids) + request.max_tokens <= CONTEXT_TOKENS
        self.asked.append(request)
        last = request.ids[-1]
        for number in range(request.max_tokens):
            may_end = number >= request.min_tokens
            if may_end and self._ends_after is not None and last >= self._ends_after:
                yield [*request.end_ids, 400]
                return
            last = min(request.first_ids) if request.first_ids and not number else last + 1
            yield [last]


def test_a_minimum_above_the_maximum_is_the_maximum(codec: Codecs) -> None:
    server, prompt = Counting(None), codec().prompt("")
    server.continues = True  # type: ignore[misc] # as `megaback serve`, which refuses more
    list(sampled_ids(server, codec(), prompt, SamplingOptions(3, min_new_tokens=9)))
    assert [(asked.min_tokens, asked.max_tokens) for asked in server.asked] == [(3, 3)]


def test_the_first_id_is_asked_for_alone_and_the_context_slides(codec: Codecs) -> None:
    prompt = codec().prompt("the end.")
    server = Counting(None)

    parts = list(sampled_ids(server, codec(), prompt, OPTIONS))

    ids = [new_id for part in parts for new_id in part]
    assert len(ids) == 30
    first, second, *later = server.asked
    assert (first.max_tokens, first.first_ids) == (1, prompt.first_ids.tolist())
    assert ids[0] == min(prompt.first_ids)
    assert second.first_ids is None
    assert list(second.ids) == [*prompt.ids, ids[0]]
    whole = [*prompt.ids, *ids]
    for request in later:
        at = whole.index(request.ids[-1], len(prompt.ids)) + 1
        assert list(request.ids) == whole[at - CONTEXT_TOKENS // 2 : at]
    assert len({request.seed for request in server.asked}) == len(server.asked)


@pytest.mark.parametrize("at_once", [None, 3])
def test_ends_are_cut_and_minimum_lengths_kept(codec: Codecs, at_once: int | None) -> None:
    prompt = replace(codec().prompt(""), ids=[1, 100])
    free = Counting(at_once, ends_after=prompt.ids[-1] + 2)
    ids = [one for part in sampled_ids(free, codec(), prompt, OPTIONS) for one in part]
    assert len(ids) == 2

    bound = Counting(at_once, ends_after=prompt.ids[-1] + 2)
    options = replace(OPTIONS, min_new_tokens=5)
    ids = [one for part in sampled_ids(bound, codec(), prompt, options) for one in part]
    assert len(ids) == 5
    assert at_once is None or all(one.max_tokens <= at_once for one in bound.asked)


def test_what_the_server_cannot_do_is_refused_by_name(codec: Codecs) -> None:
    long = codec().prompt("the end. " * 20)
    with pytest.raises(PromptError, match="the server's context holds 16"):
        next(sampled_ids(Counting(None), codec(), long, OPTIONS))
    cold = replace(OPTIONS, temperature=0.001)
    with pytest.raises(ConfigError, match=r"`temperature` is 0\.001, and counting raises it"):
        next(sampled_ids(Counting(None), codec(), codec().prompt("a"), cold))


@pytest.mark.parametrize(
    ("wrong", "kind", "named"),
    [
        ([10**9], TokenizerMismatchError, r"wrote id 1000000000, .* has [0-9]+ ids"),
        ([-3], TokenizerMismatchError, "wrote id -3"),
        (["a"], TokenizerMismatchError, "wrote id 'a'"),
        ([3], ServeError, "began with id 3, which it was asked not to"),
    ],
)
def test_ids_that_were_not_asked_for_are_an_error_and_never_a_text(
    codec: Codecs, wrong: list[Any], kind: type[MegabackError], named: str
) -> None:
    class Wrong(Counting):
        def _new_ids(self, request: Request) -> Generator[list[int], None, None]:
            del request
            yield wrong

    with pytest.raises(kind, match=named):
        next(sampled_ids(Wrong(None), codec(), codec().prompt("the end."), OPTIONS))


def test_more_ids_than_asked_for_are_an_error(codec: Codecs) -> None:
    class Endless(Counting):
        def _new_ids(self, request: Request) -> Generator[list[int], None, None]:
            yield [request.first_ids[0]] if request.first_ids else [300] * 1000

    with pytest.raises(ServeError, match="wrote more than the"):
        list(sampled_ids(Endless(None), codec(), codec().prompt("the end."), OPTIONS))


class Canned(Connection):
    """A connection with one answer to everything."""

    def __init__(self, answer: Any) -> None:
        super().__init__("http://127.0.0.1:1")
        self._answer = answer

    def ask(self, path: str, fields: Any = None) -> dict[str, Any]:
        del path, fields
        found: dict[str, Any] = self._answer
        return found

    def events(self, path: str, fields: Any) -> Generator[dict[str, Any], None, None]:
        del path, fields
        yield self._answer


@pytest.mark.parametrize(
    ("server", "answer", "named"),
    [
        (VllmServer, {"x": 1}, "does not answer as vllm does .KeyError: 'choices'"),
        # A proxy that drops fields which it does not know.
        (VllmServer, {"choices": [{"text": "abc"}]}, "wrote None tokens and sent the ids of 0"),
        (VllmServer, {"choices": [], "usage": 5}, "does not answer as vllm does .TypeError"),
        (LlamaCppServer, {"tokens": None, "stop_type": "eos"}, "does not answer as llama.cpp"),
        (LlamaCppServer, {"tokens": [], "stop_type": "limit"}, "sent no ids"),
    ],
)
def test_answers_without_ids_are_an_error_and_no_empty_text(
    codec: Codecs, server: type[ModelServer], answer: Any, named: str
) -> None:
    canned = server(Canned(answer), "model", CONTEXT_TOKENS)
    with pytest.raises(ServeError, match=named):
        list(sampled_ids(canned, codec(), codec().prompt("the end."), OPTIONS))


@pytest.mark.parametrize(
    "models",
    [
        {},
        {"data": None},
        {"data": ["model"]},
        {"data": [{"id": "model", "owned_by": "vllm"}]},
        {"data": [{"id": "model", "owned_by": "vllm", "max_model_len": None}]},
        {"data": [{"id": "model", "owned_by": "llamacpp"}]},
    ],
)
def test_a_list_of_models_of_another_form_is_an_error(codec: Codecs, models: Any) -> None:
    with pytest.raises(ServeError, match="does not answer as a server of models"):
        connect(Canned(models), codec())


def test_a_server_without_models_is_an_error(codec: Codecs) -> None:
    with pytest.raises(ServeError, match="has no model; start it with one"):
        connect(Canned({"data": []}), codec())
