"""Generation with a BackChat model: instructions for a response, the likeliest first.

A forward model generates responses to an instruction.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data_pipeline.common.number_ranges import FEW
from data_pipeline.errors import ConfigError, PromptError
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction, Prompt, direction_of
from megaback.inference.decoder import Decoder
from megaback.inference.generate import complete, sample_many
from megaback.inference.likelihood import Continuation, log_probabilities
from megaback.inference.placement import choose_device, choose_dtype
from megaback.inference.sampling import SamplingOptions
from megaback.model.gpt import ReverseGPT
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import load_model_folder


@dataclass(frozen=True)
class Candidate:
    """A generated text, and log P(text and its end | given text) in nats."""

    text: str
    log_probability: float
    tokens: int
    """Number of ids of the text and, if it ended, of its end marker."""
    is_complete: bool
    """Whether the model ended it. If not, it is truncated, and so is its likelihood."""


@dataclass(frozen=True)
class Chat:
    """A model that writes instructions for responses, or responses if it is a forward model."""

    model: ReverseGPT
    decoder: Decoder
    """Decoder with the weights of the model."""
    form: ChatFormat

    @property
    def given_name(self) -> str:
        """Name of the input: `response`, or `instruction`."""
        return "response" if self.form.writes_instruction else "instruction"

    @property
    def written_name(self) -> str:
        """Name of the output: `instruction`, or `response`."""
        return "instruction" if self.form.writes_instruction else "response"

    @property
    def prompt_name(self) -> str:
        """The key of plain generation: `ending`, or `beginning`."""
        return "ending" if self.form.writes_instruction else "beginning"

    def answer(
        self, given: str, options: SamplingOptions = SamplingOptions(), count: int = 1
    ) -> list[Candidate]:
        """Candidates for a given text: the distinct ones of `count` samples, likeliest first.

        Sample i has the seed `options.seed + i`. Likelihoods are at temperature 1, whatever the
        options; truncated samples are last. Raises PromptError for a text that is empty or leaves
        no room in the context, and ConfigError.
        """
        if (problem := FEW.problem(count)) is not None:
            raise ConfigError(f"`count` is {count!r}, {problem}")
        if not given.strip():
            raise PromptError(f"the {self.given_name} is empty; give a text")
        prompt = self.form.prompt(given.strip())
        room = self.decoder.context_tokens - len(prompt.ids)
        if room < 1:
            raise PromptError(
                f"the {self.given_name} has {len(prompt.ids)} tokens, which leaves no room for the "
                f"output in the model's context of {self.decoder.context_tokens}; shorten it"
            )
        options = replace(options, max_new_tokens=min(options.max_new_tokens, room))
        (found,) = candidates_of_each(self.model, self.decoder, self.form, [prompt], options, count)
        return found

    def complete(self, given: str, options: SamplingOptions = SamplingOptions()) -> str:
        """Plain generation, as `megaback sample` does it. Raises PromptError."""
        context_tokens = self.decoder.context_tokens
        return complete(self.decoder, self.form.codec, given, context_tokens, options)


def load_chat(
    folder: str | Path,
    *,
    device: str | None = None,
    dtype: str = "auto",
    cuda_graphs: bool = True,
    direction: Direction | str | None = None,
) -> Chat:
    """A BackChat model from a folder, a run or a checkpoint, with `device`, `dtype`,
    `cuda_graphs` and `direction` as `megaback.load` takes them.

    Raises CheckpointMissingError, CheckpointCorruptError, BackendError, ConfigError,
    DirectionMismatchError.
    """
    on = choose_device(device)
    reading = direction_of(direction)
    model, description, codec = load_model_folder(
        model_folder(folder), on, choose_dtype(dtype, on), reading
    )
    decoder = Decoder(model, description.context_tokens, takes_over=False, cuda_graphs=cuda_graphs)
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

    The decoder, which has the model's weights, generates; the model scores.
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
    """Candidates of ids that were generated for given ids; truncated ones are last.

    Ids of a complete candidate include the end marker; likelihoods are log P in nats.
    """
    found = [
        Candidate(_written(form, [*given, *ids]), likelihood, len(ids), ids[-1:] == (form.stop_id,))
        for ids, likelihood in likelihoods.items()
    ]
    return sorted(found, key=lambda one: (not one.is_complete, -one.log_probability))


def _written(form: ChatFormat, ids: Sequence[int]) -> str:
    parsed = form.parse(ids)
    return (parsed.instruction if form.writes_instruction else parsed.response) or ""
