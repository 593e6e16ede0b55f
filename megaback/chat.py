"""Asking a BackChat model: instructions for a response, the likeliest first.

With a model that writes forward it is the other way round: responses to an instruction.
"""

from dataclasses import dataclass, replace

from data_pipeline.chat_format import ChatFormat
from data_pipeline.errors import PromptError
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
    written: dict[tuple[int, ...], bool] = {}
    samples: list[list[int]] = [[] for _ in range(count)]
    for new_ids in generate_many(sampler, form.codec, [prompt] * count, options):
        for sample, new_id in zip(samples, new_ids, strict=True):
            if new_id is not None:
                sample.append(new_id)
    for ids in map(tuple, samples):
        is_complete = len(ids) < options.max_new_tokens
        written[(*ids, form.stop_id) if is_complete else ids] = is_complete
    likelihoods = log_probabilities(model, [Continuation(prompt.ids, ids) for ids in written])
    found = [
        Candidate(_written(form, [*prompt.ids, *ids]), likelihood, len(ids), is_complete)
        for (ids, is_complete), likelihood in zip(written.items(), likelihoods, strict=True)
    ]
    return sorted(found, key=lambda one: (not one.is_complete, -one.log_probability))


def _written(form: ChatFormat, ids: list[int]) -> str:
    parsed = form.parse(ids)
    return (parsed.instruction if form.writes_instruction else parsed.response) or ""
