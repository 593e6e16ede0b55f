"""Client of a running `megaback serve`: likelihoods and texts of its model.

Ids are sent in the model's reading order, so the tokenizer must be here too. A server with a token
is given that in OPENAI_API_KEY. docs/serve.md describes its fields.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import Request, urlopen

from data_pipeline.errors import ConfigError, ServeError
from data_pipeline.redaction import shown_url
from data_pipeline.text.codec import TextCodec
from megaback.inference.likelihood import Continuation, Likelihood
from tools.harness.generation import Generation, prompt_of

_PROMPTS_AT_ONCE = 64
_TOKENS_AT_ONCE = 8192
_REQUESTS_AT_ONCE = 2
_TIMEOUT_S = 600.0
_TOKEN_VARIABLE = "OPENAI_API_KEY"  # noqa: S105 - a name, which lm_eval's own clients read


class ServedModelClient:
    """One model of a server, whose tokenizer, direction and context the caller knows."""

    def __init__(self, base_url: str, codec: TextCodec, name: str | None = None) -> None:
        """Raises ConfigError for an address that is not HTTP, for a model that the server does not
        have, and for one of another direction or unit; ServeError if no server answers."""
        self._url = base_url.rstrip("/").removesuffix("/v1")
        if not self._url.startswith(("http://", "https://")):
            raise ConfigError(f"`base_url` is {base_url!r}; give one like http://127.0.0.1:8000")
        self._codec = codec
        self._headers = {"Content-Type": "application/json"}
        if token := os.environ.get(_TOKEN_VARIABLE):
            self._headers["Authorization"] = f"Bearer {token}"
        models = self._ask("/v1/models")["data"]
        named = [one for one in models if name in (None, one["id"])]
        if not named:
            known = ", ".join(one["id"] for one in models)
            raise ConfigError(f"{self._url} has no model {name!r}, only {known}; correct `model`")
        about = named[0]
        self._name: str = about["id"]
        self.context_tokens: int = about["context_tokens"]
        self.dtype: str = about["dtype"]
        for what, mine in (("direction", codec.format.direction), ("unit", codec.format.unit)):
            if about[what] != mine.value:
                raise ConfigError(
                    f"model {self._name} of {self._url} has {what} {about[what]}, and the folder "
                    f"in `pretrained` {mine.value}; name the folder that is served"
                )

    def likelihoods_of(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        """log P of each, and whether it is greedy. Raises ServeError."""
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as threads:
            parts = threads.map(self._likelihoods, _batches(continuations))
            return [one for part in parts for one in part]

    def texts(self, requests: Sequence[tuple[str, Generation]]) -> Iterator[tuple[int, str]]:
        """As `Generator.texts`, in the order of the requests."""

        def text_of(request: tuple[str, Generation]) -> str:
            context, generation = request
            options = generation.options
            room = max(1, self.context_tokens - options.max_new_tokens)
            answer = self._ask(
                "/v1/completions",
                {
                    "prompt": prompt_of(self._codec, context, room).ids,
                    "max_tokens": options.max_new_tokens,
                    "temperature": options.temperature,
                    "top_k": options.top_k,
                    "top_p": options.top_p,
                    "min_p": options.min_p,
                    "repetition_penalty": options.repetition_penalty,
                    "seed": options.seed,
                    "stop": list(generation.stops) or None,
                },
            )
            text: str = answer["choices"][0]["text"]
            return generation.cut(text, self._codec.format.direction)[0]

        with ThreadPoolExecutor(_PROMPTS_AT_ONCE) as threads:
            yield from enumerate(threads.map(text_of, requests))

    def _likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        fields = {
            "prompt": [[*one.given, *one.written] for one in continuations],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        }
        choices = self._ask("/v1/completions", fields)["choices"]
        found = []
        for choice, one in zip(choices, continuations, strict=True):
            terms = choice["logprobs"]["token_logprobs"][len(one.given) :]
            best = choice["logprobs"]["top_logprobs"][len(one.given) :]
            is_greedy = all(
                term >= max(likeliest.values()) for term, likeliest in zip(terms, best, strict=True)
            )
            found.append(Likelihood(sum(terms), is_greedy))
        return found

    def _ask(self, path: str, fields: Mapping[str, Any] | None = None) -> Any:
        if fields is not None:
            fields = {"model": self._name, **fields}
        request = Request(  # noqa: S310 - it is checked to be HTTP
            self._url + path,
            data=None if fields is None else json.dumps(fields).encode(),
            headers=self._headers,
        )
        try:
            with urlopen(request, timeout=_TIMEOUT_S) as answer:  # noqa: S310
                return json.load(answer)
        except HTTPError as error:
            reason = error.read(2000).decode("utf-8", "replace")
            with suppress(ValueError, KeyError, TypeError):
                reason = json.loads(reason)["error"]["message"]
            raise ServeError(f"{self._shown} answers {error.code}: {reason}") from None
        except (URLError, HTTPException, OSError, ValueError) as error:
            raise ServeError(
                f"{self._shown} does not answer ({error}); start `megaback serve` there, or "
                "correct `base_url`"
            ) from None

    @property
    def _shown(self) -> str:
        return shown_url(self._url)


def _batches(continuations: Sequence[Continuation]) -> Iterator[list[Continuation]]:
    batch: list[Continuation] = []
    tokens = 0
    for one in continuations:
        tokens += len(one.given) + len(one.written)
        if batch and (len(batch) == _PROMPTS_AT_ONCE or tokens > _TOKENS_AT_ONCE):
            yield batch
            batch, tokens = [], len(one.given) + len(one.written)
        batch.append(one)
    if batch:
        yield batch
