"""Asking a BackChat model: instructions for a response, the likeliest first.

With a model that writes forward it is the other way round: responses to an instruction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from data_pipeline.errors import PromptError
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Prompt
from megaback.inference.decoder import Decoder
from megaback.inference.generate import generate_many
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT


@dataclass(frozen=True)
class Candidate:
    """A text that was written, and log P(text and its end | what was given) in nats."""

    text: str
    log_probability: float
    tokens: int
    """Ids of the text and, if it came, of its end."""
    is_complete: bool
    """Whether the model ended it. If not, it was cut, and its likelihood is that of a beginning."""


def candidates(
    model: ReverseGPT,
    decoder: Decoder,
    form: ChatFormat,
    given: str,
    options: SamplingOptions,
    count: int = 1,
) -> list[Candidate]:
    """Sample `count` times, with seeds from `options.seed` on; different texts, likeliest first.

    The decoder has the model's weights, and writes; the model says how likely that was, at
    temperature 1, whatever the options. Samples that were cut come last. Raises PromptError when
    what is given leaves no room in the context.
    """
    prompt = form.prompt(given)
    room = decoder.context_tokens - len(prompt.ids)
    if room < 1:
        name = "response" if form.writes_instruction else "instruction"
        raise PromptError(
            f"the {name} is {len(prompt.ids)} tokens to read, and the model's context of "
            f"{decoder.context_tokens} must hold what it writes too; shorten it"
        )
    options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
    return candidates_of_each(model, decoder, form, [prompt], options, count)[0]


def candidates_of_each(
    model: ReverseGPT,
    decoder: Decoder,
    form: ChatFormat,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    count: int,
) -> list[list[Candidate]]:
    """`candidates` for each of several prompts of `form`, all in one batch.

    Sample j of prompt i has seed `options.seed + i * count + j`. Each prompt leaves room for
    `options.max_new_tokens`.
    """
    repeated = [prompt for prompt in prompts for _ in range(count)]
    samples: list[list[int]] = [[] for _ in repeated]
    for new_ids in generate_many(decoder, form.codec, repeated, options):
        for sample, new_id in zip(samples, new_ids, strict=True):
            if new_id is not None:
                sample.append(new_id)
    different: list[dict[tuple[int, ...], float]] = [{} for _ in prompts]
    for number, sample in enumerate(samples):
        is_cut = len(sample) >= options.max_new_tokens
        different[number // count][tuple(sample) if is_cut else (*sample, form.stop_id)] = 0.0
    each = [(number, ids) for number, of_one in enumerate(different) for ids in of_one]
    likelihoods = log_probabilities(
        model, [Continuation(prompts[number].ids, ids) for number, ids in each]
    )
    for (number, ids), likelihood in zip(each, likelihoods, strict=True):
        different[number][ids] = likelihood
    return [
        ranked(form, prompt.ids, of_one) for prompt, of_one in zip(prompts, different, strict=True)
    ]


def ranked(
    form: ChatFormat, given: Sequence[int], likelihoods: Mapping[tuple[int, ...], float]
) -> list[Candidate]:
    """Candidates of ids that were written for what is given: those that were cut come last.

    Ids of a candidate that the model ended have the end marker; likelihoods are log P in nats.
    """
    found = [
        Candidate(_written(form, [*given, *ids]), likelihood, len(ids), ids[-1:] == (form.stop_id,))
        for ids, likelihood in likelihoods.items()
    ]
    return sorted(found, key=lambda one: (not one.is_complete, -one.log_probability))


def _written(form: ChatFormat, ids: Sequence[int]) -> str:
    parsed = form.parse(ids)
    return (parsed.instruction if form.writes_instruction else parsed.response) or ""
