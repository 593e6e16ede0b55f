"""Asking a BackChat model: instructions for a response, the likeliest first.

With a model that writes forward it is the other way round: responses to an instruction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.common.number_ranges import FEW
from data_pipeline.errors import ConfigError, PromptError
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Prompt
from megaback.inference.decoder import Decoder
from megaback.inference.generate import complete, sample_many
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.inference.sampling import SamplingOptions
from megaback.inference.text_writer import choose_device
from megaback.model.gpt import ReverseGPT
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import load_model_folder

_DEFAULTS = SamplingOptions()


@dataclass(frozen=True)
class Candidate:
    """A text that was written, and log P(text and its end | what was given) in nats."""

    text: str
    log_probability: float
    tokens: int
    """Ids of the text and, if it came, of its end."""
    is_complete: bool
    """Whether the model ended it. If not, it was cut, and its likelihood is that of a beginning."""


@dataclass(frozen=True)
class Chat:
    """A model that is asked: for instructions, or for responses if it writes forward."""

    model: ReverseGPT
    decoder: Decoder
    """Decoder with the weights of the model."""
    form: ChatFormat

    @property
    def given_name(self) -> str:
        """What the model is given: `response`, or `instruction`."""
        return "response" if self.form.writes_instruction else "instruction"

    @property
    def written_name(self) -> str:
        """What the model writes: `instruction`, or `response`."""
        return "instruction" if self.form.writes_instruction else "response"

    @property
    def prompt_name(self) -> str:
        """The key of plain generation: `ending`, or `beginning`."""
        return "ending" if self.form.writes_instruction else "beginning"

    def answer(
        self, given: str, options: SamplingOptions = _DEFAULTS, count: int = 1
    ) -> list[Candidate]:
        """What could have led to a text: the different ones of `count` samples, likeliest first.

        Sample i has the seed `options.seed + i`. Likelihoods are at temperature 1, whatever the
        options; samples that were cut come last. Raises PromptError for a text that is empty or
        leaves no room in the context, and ConfigError.
        """
        if (problem := FEW.problem(count)) is not None:
            raise ConfigError(f"`count` is {count!r}, {problem}")
        if not given.strip():
            raise PromptError(f"the {self.given_name} is empty; give a text")
        prompt = self.form.prompt(given.strip())
        room = self.decoder.context_tokens - len(prompt.ids)
        if room < 1:
            raise PromptError(
                f"the {self.given_name} is {len(prompt.ids)} tokens to read, and the model's "
                f"context of {self.decoder.context_tokens} must hold what it writes too; shorten it"
            )
        options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
        (found,) = candidates_of_each(self.model, self.decoder, self.form, [prompt], options, count)
        return found

    def complete(self, given: str, options: SamplingOptions = _DEFAULTS) -> str:
        """Plain generation, as `megaback sample` does it. Raises PromptError."""
        context_tokens = self.decoder.context_tokens
        return complete(self.decoder, self.form.codec, given, context_tokens, options)


def load_chat(folder: str | Path, *, device: str | None = None) -> Chat:
    """A BackChat model to be asked: its folder, its run or a checkpoint, as `megaback.load`.

    Raises CheckpointMissingError, CheckpointCorruptError, BackendError.
    """
    on = choose_device(device)
    model, description, codec = load_model_folder(model_folder(folder), on)
    decoder = Decoder(model, description.context_tokens, takes_over=False)
    return Chat(model, decoder, ChatFormat(codec))


def candidates_of_each(
    model: ReverseGPT,
    decoder: Decoder,
    form: ChatFormat,
    prompts: Sequence[Prompt],
    options: SamplingOptions,
    count: int,
) -> list[list[Candidate]]:
    """Candidates for each of several prompts of `form`, likeliest first, all in one batch.

    The decoder has the model's weights, and writes; the model says how likely that was.
    Sample j of prompt i has seed `options.seed + i * count + j`. Each prompt leaves room for
    `options.max_new_tokens`.
    """
    repeated = [prompt for prompt in prompts for _ in range(count)]
    samples = sample_many(decoder, form.codec, repeated, options)
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
