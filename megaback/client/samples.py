"""Samples from a server, in as many requests as it needs."""

from collections.abc import Generator

from data_pipeline.common.checked_json import briefly
from data_pipeline.errors import PromptError, ServeError, TokenizerMismatchError
from data_pipeline.text.codec import Prompt, TextCodec
from megaback.client.servers import ModelServer, Request
from megaback.inference.sampling import SamplingOptions

_SEEDS = 1 << 31
_SEED_STEP = 1_000_003  # so that requests of one sample have seeds that no other sample has


def sampled_ids(
    server: ModelServer, codec: TextCodec, prompt: Prompt, options: SamplingOptions
) -> Generator[list[int], None, None]:
    """New ids of a sample in parts, without an end id.

    The first id is one of the prompt's `first_ids`: by a request of its own, unless the server has
    such a constraint. When the context is full, its older half is dropped. Raises PromptError for
    a prompt that does not fit, ConfigError and ServeError.
    """
    server.require_options(options)
    options.require_ids(codec.vocab_size)
    needed = len(prompt.ids) + (not server.continues)
    if needed > server.context_tokens:
        raise PromptError(
            f"the text has {len(prompt.ids)} tokens, and the server's context holds "
            f"{server.context_tokens}, the new ones included; shorten it"
        )
    writable = codec.writable_ids(prompt.end_id)
    end_ids = [prompt.end_id, *options.stop_ids]
    forbidden = sorted(set(range(codec.vocab_size)) - {*writable.tolist(), *end_ids})
    is_constrained = len(prompt.first_ids) < len(writable)
    ids, num_new, number = list(prompt.ids), 0, 0
    while num_new < options.max_new_tokens:
        first = prompt.first_ids.tolist() if is_constrained and not num_new else None
        length = options.max_new_tokens - num_new
        min_tokens = max(0, options.min_new_tokens - num_new)
        if not server.continues:
            if len(ids) >= server.context_tokens:
                ids = codec.newest(ids, server.context_tokens // 2)
            length = min(length, server.context_tokens - len(ids), server.tokens_at_once or length)
            if first is not None:
                length = 1
            elif server.tokens_at_once is not None and min_tokens:
                length = min(length, min_tokens)
        request = Request(
            ids=ids,
            max_tokens=length,
            min_tokens=min(min_tokens, length),
            seed=(options.seed + number * _SEED_STEP) % _SEEDS,
            options=options,
            first_ids=first,
            end_ids=end_ids,
            forbidden_ids=forbidden,
        )
        count = 0
        for part in server.new_ids(request):
            _require_known(part, codec.vocab_size, server)
            ends = [at for at, new_id in enumerate(part) if new_id in end_ids]
            new_ids = part[: ends[0]] if ends else part
            if first is not None and not count and not set(new_ids[:1]) <= set(first):
                raise ServeError(
                    f"{server.connection.shown} began with id {new_ids[0]}, which it was asked not "
                    "to, and the given text would change: it, or a proxy before it, ignores fields "
                    f"of {server.kind}; update it, or give the server's own address"
                )
            ids, count = [*ids, *new_ids], count + len(new_ids)
            if count > length:
                raise ServeError(
                    f"{server.connection.shown} wrote more than the {length:,} tokens that it was "
                    "asked for; update the server"
                )
            if new_ids:
                yield new_ids
            if ends:
                return
        if server.continues or count < length:
            return
        num_new, number = num_new + count, number + 1


def _require_known(ids: list[int], vocab_size: int, server: ModelServer) -> None:
    """Raises TokenizerMismatchError for an id that the tokenizer does not have."""
    for new_id in ids:
        if type(new_id) is not int or not 0 <= new_id < vocab_size:
            raise TokenizerMismatchError(
                f"{server.connection.shown} wrote id {briefly(new_id)}, and this tokenizer has "
                f"{vocab_size:,} ids; give the folder of the model that is served"
            )
