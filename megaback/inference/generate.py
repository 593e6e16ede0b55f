"""Writing one token after another, in the model's reading order, on one device.

A sample written beside others is the sample that is written alone: each has its own seed, forgets
by its own length and ends by itself. (The products of more rows round differently, so that fp32
logits differ by about 1e-6.)

Shapes: B rows, V vocabulary.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.errors import PromptError
from data_pipeline.text.codec import Prompt, TextCodec
from megaback.inference.decoder import Decoder
from megaback.inference.kv_cache import LayerState
from megaback.inference.sampling import SamplingOptions, TokenChooser, penalized
from megaback.model.gpt import ReverseGPT

__all__ = ["SamplingOptions", "complete", "generate", "generate_many"]


def complete(
    model: ReverseGPT | Decoder,
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


def generate(
    model: ReverseGPT | Decoder,
    codec: TextCodec,
    prompt: Prompt,
    context_tokens: int,
    options: SamplingOptions,
) -> Iterator[int]:
    """New ids one at a time, until an end marker, a stop id or `max_new_tokens`.

    When the context is full, its older half is forgotten. A Decoder has its own `context_tokens`;
    for more than one text make one, which is faster. Raises PromptError when the prompt does not
    fit.
    """
    if isinstance(model, ReverseGPT):
        decoder = Decoder(model, context_tokens, takes_over=False)
    else:
        decoder = model
    for (new_id,) in generate_many(decoder, codec, [prompt], options):
        if new_id is not None:
            yield new_id


@dataclass
class _Row:
    """A sample that is being written."""

    number: int
    ids: list[int]
    """Given and written; the last one is not read yet."""


def generate_many(
    decoder: Decoder,
    codec: TextCodec,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    seeds: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """The next id of each sample at once, None for those that have ended; until all have.

    Sample i begins with prompts[i], which all end at the same marker, and has the seed seeds[i], or
    without `seeds` `options.seed + i`.
    """
    if not prompts:
        return
    context_tokens = decoder.context_tokens
    if len({prompt.end_id for prompt in prompts}) > 1:
        raise ValueError("prompts that end at different markers cannot be gone on from together")
    for prompt in prompts:
        if len(prompt.ids) > context_tokens:
            raise PromptError(
                f"the text given is {len(prompt.ids)} tokens to read, and the model's context "
                f"holds {context_tokens}; shorten it"
            )
    rows = [_Row(number, list(prompt.ids)) for number, prompt in enumerate(prompts)]
    with torch.inference_mode():
        masks = _Masks(decoder, codec, rows, prompts, options)
        if seeds is None:
            seeds = range(options.seed, options.seed + len(rows))
        chooser = TokenChooser(options, seeds)
        read = {}
        for row in rows:
            before = tuple(row.ids[:-1])
            if before not in read:
                read[before] = decoder.read(before)
        cache = decoder.new_cache(len(rows))
        cache.fill([read[tuple(row.ids[:-1])] for row in rows])
        del read
    ends = {prompts[0].end_id, *options.stop_ids}
    for _ in range(options.max_new_tokens):
        with torch.inference_mode():
            if cache.stop == cache.capacity_tokens:
                cache.fill(
                    [_remembered(decoder, row, cache.row(at)) for at, row in enumerate(rows)]
                )
            logits_BV = masks.apply(decoder.step([row.ids[-1] for row in rows], cache))
            chosen = chooser.choose(logits_BV, [row.number for row in rows])
        new_ids: list[int | None] = [None] * len(prompts)
        for row, new_id in zip(rows, chosen, strict=True):
            if new_id not in ends:
                row.ids.append(new_id)
                new_ids[row.number] = new_id
        continuing = [at for at, row in enumerate(rows) if new_ids[row.number] is not None]
        if not continuing:
            return
        yield new_ids
        with torch.inference_mode():
            if len(continuing) < len(rows):
                cache.fill([cache.row(at) for at in continuing])
            rows = [rows[at] for at in continuing]
            masks.keep(continuing, [row.ids[-1] for row in rows])


def _remembered(decoder: Decoder, row: _Row, state: list[LayerState]) -> list[LayerState]:
    """What a row has read, without its older half if it has filled the context."""
    if state[0][0].shape[1] < decoder.context_tokens:
        return state
    return decoder.read(row.ids[-(decoder.context_tokens // 2) : -1])


class _Masks:
    """What each row may write next, and what it has seen."""

    def __init__(
        self,
        decoder: Decoder,
        codec: TextCodec,
        rows: Sequence[_Row],
        prompts: Sequence[Prompt],
        options: SamplingOptions,
    ) -> None:
        def added(ids: npt.NDArray[np.int64] | list[int]) -> Tensor:
            added_V = torch.full((decoder.vocab_size,), -torch.inf)
            added_V[torch.as_tensor(np.asarray(ids, dtype=np.int64))] = 0
            return added_V

        ends = [prompts[0].end_id, *options.stop_ids]
        self._added_BV = torch.stack([added(prompt.first_ids) for prompt in prompts])
        self._added_BV = self._added_BV.to(decoder.device)
        writable = [*codec.writable_ids(prompts[0].end_id).tolist(), *options.stop_ids]
        self._later_V = added(writable).to(decoder.device)
        self._early_V = self._later_V.clone()
        self._early_V[ends] = -torch.inf
        self._num_written, self._min_new_tokens = 0, options.min_new_tokens
        if self._min_new_tokens:
            self._added_BV[:, ends] = -torch.inf
        self._penalty = options.repetition_penalty
        self._seen_BV: Tensor | None = None
        if self._penalty != 1:
            self._seen_BV = torch.zeros_like(self._added_BV, dtype=torch.bool)
            for seen_V, row in zip(self._seen_BV, rows, strict=True):
                seen_V[torch.tensor(row.ids, device=decoder.device)] = True

    def apply(self, logits_BV: Tensor) -> Tensor:
        """Logits, -inf where a row may not write."""
        if self._seen_BV is not None:
            logits_BV = penalized(logits_BV, self._seen_BV, self._penalty)
        return logits_BV + self._added_BV

    def keep(self, continuing: Sequence[int], new_ids: Sequence[int]) -> None:
        """Go on with these rows, which have written these ids."""
        self._num_written += 1
        is_early = self._num_written < self._min_new_tokens
        self._added_BV = self._early_V if is_early else self._later_V
        if self._seen_BV is not None:
            self._seen_BV = self._seen_BV[list(continuing)]
            at_B1 = torch.tensor(new_ids, device=self._seen_BV.device)[:, None]
            self._seen_BV.scatter_(1, at_B1, True)
