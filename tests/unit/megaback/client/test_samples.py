"""Samples in several requests: the constraint of the first id, minimum lengths, full contexts."""

from collections.abc import Callable, Generator
from dataclasses import replace

import pytest

from data_pipeline.errors import ConfigError, PromptError
from data_pipeline.text.codec import TextCodec
from megaback.client.connection import Connection
from megaback.client.samples import sampled_ids
from megaback.client.servers import ModelServer, Request
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

    def new_ids(self, request: Request) -> Generator[list[int], None, None]:
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
