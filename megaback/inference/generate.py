"""Generation of new ids after prompts, in the model's reading order."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace

from data_pipeline.text.codec import Prompt, TextCodec
from megaback.inference.batch import ContinuousBatch, ReadingError, Sample
from megaback.inference.decoder import Decoder
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT


def complete(
    model: ReverseGPT | Decoder,
    codec: TextCodec,
    given: str,
    context_tokens: int,
    options: SamplingOptions,
) -> str:
    """The given text and its completion, in reading order.

    A backward model writes the text before `given`, a forward model the text after it. Raises
    PromptError if `given` is longer than the model's context.
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

    When the context is full, its older half is dropped. A Decoder has its own `context_tokens`;
    for more than one text make one, which is faster. Raises PromptError if the prompt does not
    fit.
    """
    if isinstance(model, ReverseGPT):
        decoder = Decoder(model, context_tokens, takes_over=False)
    else:
        decoder = model
    for (new_id,) in generate_many(decoder, codec, [prompt], options):
        if new_id is not None:
            yield new_id


def sample_many(
    decoder: Decoder,
    codec: TextCodec,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    seeds: Sequence[int] | None = None,
) -> list[list[int]]:
    """All new ids of each sample of `generate_many`."""
    samples: list[list[int]] = [[] for _ in prompts]
    for new_ids in generate_many(decoder, codec, prompts, options, seeds):
        for sample, new_id in zip(samples, new_ids, strict=True):
            if new_id is not None:
                sample.append(new_id)
    return samples


def generate_many(
    decoder: Decoder,
    codec: TextCodec,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    seeds: Sequence[int] | None = None,
) -> Iterator[list[int | None]]:
    """The next id of each sample, None for those that have ended, until all have.

    Sample i begins with prompts[i]; its seed is seeds[i], or without `seeds` `options.seed + i`.
    Raises PromptError if a prompt does not fit the context.
    """
    if not prompts:
        return
    if seeds is None:
        seeds = range(options.seed, options.seed + len(prompts))
    batch = _batch_for(decoder, codec, len(prompts))
    numbers: dict[Sample, int] = {}
    for number, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
        sample = Sample(prompt, replace(options, seed=seed))
        batch.add(sample)
        numbers[sample] = number
    try:
        while len(batch):
            try:
                batch.read(math.inf)
            except ReadingError as error:
                raise error.__cause__ or error from None
            new_ids: list[int | None] = [None] * len(prompts)
            for step in batch.step():
                if not step.is_end:
                    new_ids[numbers[step.sample]] = step.new_id
            if any(new_id is not None for new_id in new_ids):
                yield new_ids
    finally:
        if batch.has_graphs:
            batch.clear()
            decoder.idle_batch = batch


def _batch_for(decoder: Decoder, codec: TextCodec, num_slots: int) -> ContinuousBatch:
    """An empty batch with at least as many slots: the last one, if it has captured its steps."""
    idle, decoder.idle_batch = decoder.idle_batch, None
    if isinstance(idle, ContinuousBatch) and idle.num_slots >= num_slots and idle.codec is codec:
        return idle
    del idle  # before memory for another is allocated
    return ContinuousBatch(decoder, codec, num_slots)
