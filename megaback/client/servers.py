"""Servers of models that take and return ids: `megaback serve`, vLLM and llama.cpp.

Each is asked in its own dialect. Ids are in the model's reading order.
"""

from abc import ABC, abstractmethod
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from data_pipeline.common.checked_json import briefly
from data_pipeline.errors import (
    BackendError,
    ConfigError,
    DirectionMismatchError,
    ServeError,
    TokenizerMismatchError,
)
from data_pipeline.text.codec import TextCodec
from megaback.client.connection import Connection
from megaback.inference.likelihood import Continuation, Likelihood
from megaback.inference.sampling import MIN_TEMPERATURE, SamplingOptions

_FORBIDDING_BIAS = -100.0  # vLLM's minimum
_PREFERRING_BIAS = 100.0


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request for new ids after some."""

    ids: Sequence[int]
    max_tokens: int
    min_tokens: int
    seed: int
    options: SamplingOptions
    first_ids: Sequence[int] | None
    """Ids one of which the first new id is; None for all with text."""
    end_ids: Sequence[int]
    forbidden_ids: Sequence[int]
    """Ids that no text contains."""


class ModelServer(ABC):
    """One model of a server."""

    kind: ClassVar[str]
    continues: ClassVar[bool] = False
    """Whether one request is a whole sample: a constraint of its first id, a full context."""
    serves_both: ClassVar[bool] = True
    """Whether a model of both directions has one name."""
    tokens_at_once: ClassVar[int | None] = None
    """Maximum new tokens of a request, if its ids arrive only when it is complete."""
    gives_scores: ClassVar[bool] = False
    """Whether it gives probabilities of a prompt's ids."""
    min_temperature: ClassVar[float] = 0.0
    """Minimum of temperatures that are not greedy."""
    dtype: str = "the server's data type"

    def __init__(self, connection: Connection, name: str, context_tokens: int) -> None:
        self.connection = connection
        self.name = name
        self.context_tokens = context_tokens

    def new_ids(self, request: Request) -> Generator[list[int], None, None]:
        """New ids in parts, perhaps with the end id as the last. Raises ServeError."""
        with self.connection.reading(self.kind):
            yield from self._new_ids(request)

    @abstractmethod
    def _new_ids(self, request: Request) -> Generator[list[int], None, None]: ...

    def require_scores(self) -> None:
        """Raises BackendError if the server gives no probabilities of a prompt's ids."""
        if not self.gives_scores:
            raise BackendError(
                f"{self.kind} at {self.connection.shown} gives no probabilities of a prompt's ids, "
                "by which texts are scored; use `megaback serve`, vLLM, or no `server`"
            )

    def require_options(self, options: SamplingOptions) -> None:
        """Raises ConfigError for an option that the server does not apply, by its name."""
        if MIN_TEMPERATURE <= options.temperature < self.min_temperature:
            raise ConfigError(
                f"`temperature` is {options.temperature}, and {self.kind} raises it to "
                f"{self.min_temperature}; give that, or 0"
            )

    def likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        """log P of each, and whether it is greedy. Raises BackendError, ServeError."""
        self.require_scores()
        with self.connection.reading(self.kind):
            return self._likelihoods(continuations)

    def _likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        raise NotImplementedError

    def _sampling(self, request: Request) -> dict[str, Any]:
        """Fields that `megaback serve` and vLLM have in common."""
        options = request.options
        return {
            "model": self.name,
            "prompt": list(request.ids),
            "max_tokens": request.max_tokens,
            "min_tokens": request.min_tokens,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "repetition_penalty": options.repetition_penalty,
            "seed": request.seed,
            "return_token_ids": True,
            "stream": True,
        }

    def _streamed(self, fields: Mapping[str, Any]) -> Generator[list[int], None, None]:
        """Ids of a stream whose last event has their number."""
        count, expected = 0, None
        for event in self.connection.events("/v1/completions", fields):
            for choice in event["choices"]:
                ids = list(choice.get("token_ids") or ())
                count += len(ids)
                yield ids
            if event.get("usage") is not None:
                expected = event["usage"]["completion_tokens"]
        if expected != count:
            raise ServeError(
                f"{self.connection.shown} wrote {briefly(expected)} tokens and sent the ids of "
                f"{count}; update it, or give the server's own address in place of a proxy's"
            )


class MegabackServer(ModelServer):
    """`megaback serve`."""

    kind = "megaback"
    gives_scores = True
    continues = True
    serves_both = False

    def _new_ids(self, request: Request) -> Generator[list[int], None, None]:
        fields = self._sampling(request) | {
            "stream_order": "writing",
            "stream_options": {"include_usage": True},
            "stop_token_ids": list(request.options.stop_ids),
        }
        if request.first_ids is not None:
            fields["first_token_ids"] = list(request.first_ids)
        yield from self._streamed(fields)

    def _likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        fields = {
            "model": self.name,
            "prompt": [[*one.given, *one.written] for one in continuations],
            "max_tokens": 0,
            "echo": True,
            "logprobs": 1,
        }
        choices = self.connection.ask("/v1/completions", fields)["choices"]
        found = []
        for choice, one in zip(choices, continuations, strict=True):
            terms = choice["logprobs"]["token_logprobs"][len(one.given) :]
            best = choice["logprobs"]["top_logprobs"][len(one.given) :]
            is_greedy = all(
                term >= max(likeliest.values()) for term, likeliest in zip(terms, best, strict=True)
            )
            found.append(Likelihood(sum(terms), is_greedy))
        return found


class VllmServer(ModelServer):
    """vLLM's OpenAI-compatible server, with or without its tokenizer."""

    kind = "vllm"
    gives_scores = True
    min_temperature = 0.01

    def _new_ids(self, request: Request) -> Generator[list[int], None, None]:
        fields = self._sampling(request) | {
            "stream_options": {"include_usage": True},
            "stop_token_ids": list(request.end_ids),
            "skip_special_tokens": False,
        }
        if request.first_ids is not None:
            fields["allowed_token_ids"] = list(request.first_ids)
        else:
            fields["logit_bias"] = {str(i): _FORBIDDING_BIAS for i in request.forbidden_ids}
        yield from self._streamed(fields)

    def _likelihoods(self, continuations: Sequence[Continuation]) -> list[Likelihood]:
        fields = {
            "model": self.name,
            "prompt": [[*one.given, *one.written] for one in continuations],
            "max_tokens": 1,
            "temperature": 0,
            "prompt_logprobs": 1,
        }
        choices = self.connection.ask("/v1/completions", fields)["choices"]
        found = []
        for choice, one in zip(choices, continuations, strict=True):
            tops = choice["prompt_logprobs"][len(one.given) :]
            chosen = [top[str(i)] for top, i in zip(tops, one.written, strict=True)]
            total = sum(entry["logprob"] for entry in chosen)
            found.append(Likelihood(total, all(entry["rank"] == 1 for entry in chosen)))
        return found


class LlamaCppServer(ModelServer):
    """llama.cpp's `llama-server`, and others with its `/completion`.

    Its streams omit ids of incomplete characters, so that ids are read from whole answers, a few
    tokens each; the server keeps the state of the prompt in between.
    """

    kind = "llama.cpp"
    tokens_at_once = 16

    def _new_ids(self, request: Request) -> Generator[list[int], None, None]:
        options = request.options
        biases: list[list[Any]] = [[i, False] for i in request.forbidden_ids]
        if request.first_ids is not None:
            biases += [[int(i), _PREFERRING_BIAS] for i in request.first_ids]
        if request.min_tokens:
            biases += [[i, False] for i in request.end_ids]
        answer = self.connection.ask(
            "/completion",
            {
                "prompt": list(request.ids),
                "n_predict": request.max_tokens,
                "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
                "temperature": options.temperature,
                "top_k": options.top_k,
                "top_p": options.top_p,
                "min_p": options.min_p,
                "repeat_penalty": options.repetition_penalty,
                "repeat_last_n": self.context_tokens,
                "seed": request.seed % (1 << 31),
                "logit_bias": biases,
                "return_tokens": True,
                "cache_prompt": True,
            },
        )
        ids, is_ended = list(answer["tokens"]), answer["stop_type"] == "eos"
        if not ids and not is_ended:
            raise ServeError(f"{self.connection.shown} sent no ids; update llama.cpp")
        yield ids
        if is_ended:
            yield list(request.end_ids[:1])


_OWNERS: dict[str, type[ModelServer]] = {
    "megaback": MegabackServer,
    "vllm": VllmServer,
    "llamacpp": LlamaCppServer,
}
SERVERS = {one.kind: one for one in _OWNERS.values()}


def connect(
    connection: Connection, codec: TextCodec, model: str | None = None, kind: str | None = None
) -> ModelServer:
    """The model of a server that has this name, or else this codec's format.

    `kind`: `megaback`, `vllm` or `llama.cpp`; by default, what the server says. Raises ServeError
    if no server answers, ConfigError for an unknown server or model, DirectionMismatchError and
    TokenizerMismatchError for a model of another format.
    """
    if kind is not None and kind not in SERVERS:
        raise ConfigError(f"`kind` is {kind!r}; use {', '.join(SERVERS)}, or omit it")
    with connection.reading(kind or "a server of models"):
        return _connected(connection, codec, model, kind)


def _connected(
    connection: Connection, codec: TextCodec, model: str | None, kind: str | None
) -> ModelServer:
    models: list[dict[str, Any]] = connection.ask("/v1/models")["data"]
    known = [str(one["id"]) for one in models]
    named = [one for one in models if model in (None, one["id"])]
    if not known:
        raise ServeError(f"{connection.shown} has no model; start it with one")
    if not named:
        raise ConfigError(f"{connection.shown} has no model {model!r}, only {', '.join(known)}")
    owner = named[0].get("owned_by")
    server = SERVERS.get(kind) if kind is not None else _OWNERS.get(str(owner))
    if server is None:
        raise ConfigError(
            f"{connection.shown} says that it is {owner!r}, which is none of {', '.join(SERVERS)}; "
            "behind a proxy, say which one: kind= of megaback.remote"
        )
    if server is MegabackServer:
        return _of_megaback(connection, codec, named)
    found = named[0]
    if server is VllmServer:
        return VllmServer(connection, found["id"], int(found["max_model_len"]))
    vocab_size = found["meta"]["n_vocab"]
    if vocab_size != codec.vocab_size:
        raise TokenizerMismatchError(
            f"the model of {connection.shown} has {vocab_size} ids, and this tokenizer "
            f"{codec.vocab_size}; give the model's own"
        )
    context_tokens = connection.ask("/props")["default_generation_settings"]["n_ctx"]
    return LlamaCppServer(connection, found["id"], int(context_tokens))


def _of_megaback(
    connection: Connection, codec: TextCodec, models: Sequence[Mapping[str, Any]]
) -> ModelServer:
    mine = codec.format
    wanted = {
        "direction": mine.direction.value,
        "unit": mine.unit.value,
        "tokenizer_sha256": mine.tokenizer_sha256,
    }
    equal = [one for one in models if all(one.get(key) == value for key, value in wanted.items())]
    if not equal:
        about = models[0]
        key = next(key for key, value in wanted.items() if about.get(key) != value)
        kind = TokenizerMismatchError if key == "tokenizer_sha256" else DirectionMismatchError
        raise kind(
            f"model {about['id']} of {connection.shown} has {key} {about.get(key)}, and the given "
            f"one {wanted[key]}; give the folder that is served"
        )
    about = equal[0]
    server = MegabackServer(connection, about["id"], int(about["context_tokens"]))
    server.dtype = about["dtype"]
    return server
