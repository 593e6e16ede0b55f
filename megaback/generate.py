"""Sampling one token after another, in the model's reading order, on one device."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data_pipeline.errors import PromptError
from data_pipeline.text import Prompt, TextCodec
from megaback.attention import Segments
from megaback.cache import KeyValueCache
from megaback.model import ReverseGPT


@dataclass(frozen=True)
class SamplingOptions:
    """How to choose tokens; the defaults are the seed experiment's."""

    max_new_tokens: int = 500
    temperature: float = 0.8
    """0 takes the most likely token."""
    top_k: int = 200
    """Choose among this many of the most likely tokens; 0 for all."""
    seed: int = 0


def complete(
    model: ReverseGPT,
    codec: TextCodec,
    given: str,
    context_tokens: int,
    options: SamplingOptions,
) -> str:
    """Text, in a person's reading order, with what the model adds to what was given.

    A backward model writes what comes before `given`, a forward model what comes after. Raises
    PromptError when `given` is longer than the model's context.
    """
    prompt = codec.prompt(given)
    new_ids = generate(model, codec, prompt, context_tokens, options)
    return codec.render([*prompt.ids, *new_ids])


@torch.inference_mode()
def generate(
    model: ReverseGPT,
    codec: TextCodec,
    prompt: Prompt,
    context_tokens: int,
    options: SamplingOptions,
) -> Iterator[int]:
    """New ids one at a time, until the document's end or `max_new_tokens`.

    When the context is full, its older half is forgotten. Raises PromptError when the prompt does
    not fit.
    """
    if len(prompt.ids) > context_tokens:
        raise PromptError(
            f"the text given is {len(prompt.ids)} tokens to read, and the model's context holds "
            f"{context_tokens}; shorten it"
        )
    device = next(model.parameters()).device
    writable_V = _mask(codec, codec.writable_ids(), device)
    allowed_V = _mask(codec, prompt.first_ids, device)
    generator = torch.Generator(device=device).manual_seed(options.seed)
    shape = model.shape
    cache = KeyValueCache(
        shape.num_layers, context_tokens, shape.kv_heads, shape.head_dim, model.lm_head.weight
    )
    ids = list(prompt.ids)
    unread = list(ids)
    for _ in range(options.max_new_tokens):
        if cache.length + len(unread) > context_tokens:
            cache.clear()
            unread = ids[-(context_tokens // 2) :]
        logits_V = _read(model, unread, cache, device)
        chosen = _choose(logits_V.masked_fill(~allowed_V, -torch.inf), options, generator)
        if chosen == codec.end_id:
            return
        ids.append(chosen)
        unread = [chosen]
        allowed_V = writable_V
        yield chosen


def _read(
    model: ReverseGPT, ids: Sequence[int], cache: KeyValueCache, device: torch.device
) -> Tensor:
    """Append ids to what the cache has read; logits of the next id, in fp32: shape (V,)."""
    positions_T = torch.arange(cache.length, cache.length + len(ids), device=device)
    ids_T = torch.tensor(ids, device=device)
    segments = Segments.from_lengths((len(ids),), device)
    hidden_TD = model.hidden(ids_T, positions_T, segments, cache)
    logits_V: Tensor = model.lm_head(hidden_TD[-1]).float()
    return logits_V


def _choose(logits_V: Tensor, options: SamplingOptions, generator: torch.Generator) -> int:
    if options.temperature == 0:
        return int(logits_V.argmax())
    logits_V = logits_V / options.temperature
    if 0 < options.top_k < len(logits_V):
        least = logits_V.topk(options.top_k).values[-1]
        logits_V = logits_V.masked_fill(logits_V < least, -torch.inf)
    return int(torch.multinomial(logits_V.softmax(-1), 1, generator=generator))


def _mask(codec: TextCodec, ids: np.ndarray, device: torch.device) -> Tensor:
    mask_V = torch.zeros(codec.vocab_size, dtype=torch.bool, device=device)
    mask_V[torch.from_numpy(ids).to(device)] = True
    return mask_V
