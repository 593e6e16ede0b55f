"""Texts of a running `megaback serve`, as evaluation harnesses ask for them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

from data_pipeline.errors import ConfigError
from data_pipeline.text.codec import TextCodec
from megaback.client.servers import MegabackServer, ModelServer
from tools.harness.generation import Generation, prompt_of

_PROMPTS_AT_ONCE = 64


def served_texts(
    server: ModelServer, codec: TextCodec, requests: Sequence[tuple[str, Generation]]
) -> Iterator[tuple[int, str]]:
    """As `Generator.texts`, in the order of the requests. Raises ConfigError, ServeError."""
    if not isinstance(server, MegabackServer):
        raise ConfigError(
            f"{server.connection.shown} is {server.kind}, whose texts of ids are not in reading "
            "order; generate with `megaback serve`"
        )

    def text_of(request: tuple[str, Generation]) -> str:
        context, generation = request
        options = generation.options
        room = max(1, server.context_tokens - options.max_new_tokens)
        fields = {
            "model": server.name,
            "prompt": prompt_of(codec, context, room).ids,
            "max_tokens": options.max_new_tokens,
            "temperature": options.temperature,
            "top_k": options.top_k,
            "top_p": options.top_p,
            "min_p": options.min_p,
            "repetition_penalty": options.repetition_penalty,
            "seed": options.seed,
            "stop": list(generation.stops) or None,
        }
        text: str = server.connection.ask("/v1/completions", fields)["choices"][0]["text"]
        return generation.cut(text, codec.format.direction)[0]

    with ThreadPoolExecutor(_PROMPTS_AT_ONCE) as threads:
        yield from enumerate(threads.map(text_of, requests))
