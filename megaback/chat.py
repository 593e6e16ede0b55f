"""Asking a BackChat model: instructions for a response, the likeliest first.

With a model that writes forward it is the other way round: responses to an instruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from data_pipeline.chat_format import ChatFormat
from data_pipeline.errors import PromptError
from data_pipeline.text import Prompt
from megaback.choice import SamplingOptions
from megaback.generate import generate_many
from megaback.likelihood import Continuation, log_probabilities
from megaback.model import ReverseGPT
from megaback.sampler import Sampler


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
    sampler: Sampler,
    form: ChatFormat,
    given: str,
    options: SamplingOptions,
    count: int = 1,
) -> list[Candidate]:
    """Sample `count` times, with seeds from `options.seed` on; different texts, likeliest first.

    The sampler has the model's weights, and writes; the model says how likely that was, at
    temperature 1, whatever the options. Samples that were cut come last. Raises PromptError when
    what is given leaves no room in the context.
    """
    prompt = form.prompt(given)
    room = sampler.context_tokens - len(prompt.ids)
    if room < 1:
        name = "response" if form.writes_instruction else "instruction"
        raise PromptError(
            f"the {name} is {len(prompt.ids)} tokens to read, and the model's context of "
            f"{sampler.context_tokens} must hold what it writes too; shorten it"
        )
    options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
    return candidates_of_each(model, sampler, form, [prompt], options, count)[0]


def candidates_of_each(
    model: ReverseGPT,
    sampler: Sampler,
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
    for new_ids in generate_many(sampler, form.codec, repeated, options):
        for sample, new_id in zip(samples, new_ids, strict=True):
            if new_id is not None:
                sample.append(new_id)
    different: dict[tuple[int, tuple[int, ...]], bool] = {}
    for number, sample in enumerate(samples):
        is_complete = len(sample) < options.max_new_tokens
        ids = (*sample, form.stop_id) if is_complete else tuple(sample)
        different[number // count, ids] = is_complete
    likelihoods = log_probabilities(
        model, [Continuation(prompts[number].ids, ids) for number, ids in different]
    )
    found: list[list[Candidate]] = [[] for _ in prompts]
    for ((number, ids), is_complete), likelihood in zip(
        different.items(), likelihoods, strict=True
    ):
        text = _written(form, [*prompts[number].ids, *ids])
        found[number].append(Candidate(text, likelihood, len(ids), is_complete))
    return [
        sorted(of_one, key=lambda one: (not one.is_complete, -one.log_probability))
        for of_one in found
    ]


def _written(form: ChatFormat, ids: list[int]) -> str:
    parsed = form.parse(ids)
    return (parsed.instruction if form.writes_instruction else parsed.response) or ""
