"""Instruction backtranslation: generates and scores instructions for texts.

Li et al., "Self-Alignment with Instruction Backtranslation" (2023): a model that writes backward
turns human-written texts into examples for fine-tuning.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from data_pipeline.text.chat_format import ChatFormat
    from megaback.inference.chat import Candidate
    from megaback.inference.decoder import Decoder
    from megaback.inference.sampling import SamplingOptions
    from megaback.model.gpt import ReverseGPT

EMPTY, TOO_LONG, NONE_ENDED = "empty", "too long", "no instruction that ends"


@dataclass(frozen=True)
class Text:
    """One text of the source, and its index among the distinct ones."""

    index: int
    position: str
    text: str


@dataclass(frozen=True)
class Proposal:
    """An instruction for a text, with its scores in nats."""

    instruction: str
    log_probability: float
    """log P(instruction | text), of the backward model."""
    score: float
    """Score for ranking; see `BackTranslator`."""
    cycle_log_probability: float | None = None
    """log P(text | instruction), of a forward model."""

    def rounded(self) -> dict[str, Any]:
        """Fields for JSON, rounded to the precision of fp32."""
        return {
            name: round(value, 5) if isinstance(value, float) else value
            for name, value in asdict(self).items()
        }


@dataclass(frozen=True)
class RoundTripScorer:
    """A forward model, which scores how likely an instruction leads back to its text."""

    model: "ReverseGPT"
    form: "ChatFormat"
    context_tokens: int

    def log_probabilities(
        self, text: str, instructions: Sequence[str]
    ) -> list[tuple[float | None, int]]:
        """(log P(text | instruction), number of the text's tokens) per instruction.

        The first is None if both do not fit the context.
        """
        from megaback.inference.likelihood import Continuation, log_probabilities

        written = self.form.written_ids(text)
        asked = [Continuation(self.form.prompt_ids(one), written) for one in instructions]
        fitting = [
            number
            for number, one in enumerate(asked)
            if len(one.given) + len(one.written) <= self.context_tokens
        ]
        found = log_probabilities(self.model, [asked[number] for number in fitting])
        by_number = dict(zip(fitting, found, strict=True))
        return [(by_number.get(number), len(written)) for number in range(len(asked))]


@dataclass(frozen=True, kw_only=True)
class BackTranslator:
    """A backward model that writes instructions, and optionally a forward one that scores them.

    Without the forward model, the score of an instruction is log P(instruction | text) per token.
    With it, the score is (log P(text | instruction) - log P(text | empty instruction)) per token of
    the text: how much the instruction says about the text.
    """

    model: "ReverseGPT"
    decoder: "Decoder"
    form: "ChatFormat"
    round_trip: RoundTripScorer | None
    options: "SamplingOptions"
    count: int

    def records(self, texts: Sequence[Text]) -> list[dict[str, Any]]:
        """A record per text with its proposals, best first, or the reason why it has none.

        The seeds of a text's samples start at `options.seed + index * count`.
        """
        from megaback.inference.chat import candidates_of_each

        prompts = {}
        excluded = {}
        for text in texts:
            prompt = self.form.prompt(text.text)
            if not text.text:
                excluded[text.index] = EMPTY
            elif len(prompt.ids) + self.options.max_new_tokens > self.decoder.context_tokens:
                excluded[text.index] = TOO_LONG
            else:
                prompts[text.index] = prompt
        written: dict[int, list[Candidate]] = {}
        for first, numbers in _runs(list(prompts)):
            options = replace(self.options, seed=self.options.seed + first * self.count)
            found = candidates_of_each(
                self.model,
                self.decoder,
                self.form,
                [prompts[number] for number in numbers],
                options,
                self.count,
            )
            written |= dict(zip(numbers, found, strict=True))
        return [
            self._record(text, written.get(text.index), excluded.get(text.index)) for text in texts
        ]

    def _record(
        self, text: Text, found: "list[Candidate] | None", why: str | None
    ) -> dict[str, Any]:
        record: dict[str, Any] = asdict(text)
        if found is None:
            return {**record, "excluded": why}
        proposals, why = self._scored(text.text, [one for one in found if one.is_complete])
        if not proposals:
            return {**record, "excluded": why}
        return {**record, "proposals": [one.rounded() for one in proposals]}

    def _scored(self, text: str, found: "list[Candidate]") -> tuple[list[Proposal], str]:
        """Proposals, best first, and the reason if there are none."""
        # Different ids may decode to the same text.
        by_text = {one.text.strip(): one for one in reversed(found) if one.text.strip()}
        instructions = list(reversed(by_text))
        if self.round_trip is None:
            proposals = [
                Proposal(name, one.log_probability, one.log_probability / one.tokens)
                for name, one in ((name, by_text[name]) for name in instructions)
            ]
            return sorted(proposals, key=lambda one: -one.score), NONE_ENDED
        if not instructions:
            return [], NONE_ENDED
        (prior, tokens), *scored = self.round_trip.log_probabilities(text, ["", *instructions])
        proposals = [
            Proposal(name, by_text[name].log_probability, (likelihood - prior) / tokens, likelihood)
            for name, (likelihood, _) in zip(instructions, scored, strict=True)
            if likelihood is not None and prior is not None
        ]
        return sorted(proposals, key=lambda one: -one.score), TOO_LONG


def _runs(numbers: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Consecutive numbers, whose seeds are consecutive too, with the first of each run."""
    run: list[int] = []
    for number in numbers:
        if run and number != run[-1] + 1:
            yield run[0], run
            run = []
        run.append(number)
    if run:
        yield run[0], run
