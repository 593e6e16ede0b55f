"""Infilling: the middle of a text with given beginning and ending, by two models that meet.

A forward model continues the beginning, a backward model continues the ending backward, and their
halves are joined where both models find the whole most likely. docs/infill.md has the method and
its formulas. Guarantees: a result's text is beginning + middle + ending, character for character,
and the same seed gives the same result, alone or among other gaps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from data_pipeline.common.number_ranges import COUNT, COUNT_OR_ZERO, SHARE
from data_pipeline.errors import ConfigError, DirectionMismatchError, PromptError
from data_pipeline.text.codec import Direction, TextCodec
from megaback.inference.decoder import Decoder
from megaback.inference.direction_pair import require_pair
from megaback.inference.generate import sample_many
from megaback.inference.infill.join_scores import TOKENS_AT_ONCE, Half, score_half_steps
from megaback.inference.infill.join_search import Join, best_join_steps, mean_per_token
from megaback.inference.infill.prompts import InfillPrompts
from megaback.inference.likelihood import Continuation, log_probability_steps
from megaback.inference.placement import choose_device, choose_dtype
from megaback.inference.sampling import SamplingOptions
from megaback.inference.steps import Steps, finish
from megaback.model.gpt import ReverseGPT
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import load_model_folder, read_description

_ROWS_AT_ONCE = 64
_ALLOWED = {
    "max_new_tokens": COUNT,
    "min_new_tokens": COUNT,
    "forward_candidates": COUNT_OR_ZERO,
    "backward_candidates": COUNT_OR_ZERO,
    "rescored": COUNT,
    "forward_weight": SHARE,
}


@dataclass(frozen=True)
class Reader:
    """A model that generates and scores in one direction."""

    model: ReverseGPT
    decoder: Decoder
    """Decoder with the weights of the model, and its context."""
    codec: TextCodec

    @classmethod
    def load(
        cls,
        folder: Path,
        device: str | None = None,
        dtype: str = "auto",
        *,
        cuda_graphs: bool = True,
        direction: Direction | None = None,
    ) -> "Reader":
        """The model in a folder that `megaback convert` wrote, of a run or of a checkpoint."""
        on = choose_device(device)
        model, description, codec = load_model_folder(
            model_folder(folder), on, choose_dtype(dtype, on), direction
        )
        decoder = Decoder(
            model, description.context_tokens, takes_over=False, cuda_graphs=cuda_graphs
        )
        return cls(model, decoder, codec)

    def reading(self, direction: Direction) -> "Reader":
        """This model of both directions in one of them."""
        turned = replace(self.codec.format, direction=direction)
        return replace(self, codec=TextCodec.of(self.codec.model_bytes, turned))


@dataclass(frozen=True)
class InfillOptions:
    """Length of a middle, and the number of candidates."""

    max_new_tokens: int = 32
    """Maximum tokens of the middle, as the models tokenize it."""
    min_new_tokens: int = 1
    forward_candidates: int = 16
    """Samples of the forward model; with 0, the backward model writes the whole middle."""
    backward_candidates: int = 16
    rescored: int = 16
    """Number of joins that are scored exactly and returned."""
    forward_weight: float = 0.5
    """Weight of the forward model in the score, from 0 to 1; the backward model has the rest."""
    sampling: SamplingOptions = field(default_factory=SamplingOptions)
    """`max_new_tokens` and `stop_ids` are ignored."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name, allowed in _ALLOWED.items():
            if (problem := allowed.problem(getattr(self, name))) is not None:
                raise ConfigError(f"`{name}` is {getattr(self, name)!r}, {problem}")
        if self.max_new_tokens < self.min_new_tokens:
            raise ConfigError(
                f"`max_new_tokens` is {self.max_new_tokens}, less than `min_new_tokens` "
                f"{self.min_new_tokens}; raise it"
            )
        if self.forward_candidates + self.backward_candidates == 0:
            raise ConfigError(
                "`forward_candidates` and `backward_candidates` are both 0; raise one of them"
            )


@dataclass(frozen=True, kw_only=True)
class Infill:
    """A middle with its scores by both models."""

    middle: str
    score: float
    """Nats per scored token; higher is better."""
    forward: float
    """log P(middle and ending | beginning) by the forward model, in nats."""
    backward: float
    """log P(middle and beginning | ending) by the backward model, in nats."""
    forward_tokens: int
    """Number of tokens that `forward` is the sum of."""
    backward_tokens: int
    written_forward: int | None = None
    """Tokens of the middle that the forward model wrote; None for a given middle."""
    written_backward: int | None = None


class Infiller:
    """Infilling by a forward and a backward model."""

    def __init__(self, forward: Reader, backward: Reader) -> None:
        """Raises TokenizerMismatchError or DirectionMismatchError."""
        require_pair(forward.codec.format, backward.codec.format)
        self.forward, self.backward = forward, backward
        self.context_tokens = min(forward.decoder.context_tokens, backward.decoder.context_tokens)

    def fill(
        self, beginning: str, ending: str, options: InfillOptions = InfillOptions()
    ) -> list[Infill]:
        """Distinct middles, the best first; none if no join has an allowed length.

        Raises PromptError if a text is empty, or both with the middle do not fit the context.
        """
        (found,) = self.fill_many([(beginning, ending)], options)
        return found

    def fill_many(
        self, gaps: Sequence[tuple[str, str]], options: InfillOptions = InfillOptions()
    ) -> list[list[Infill]]:
        """`fill` of each (beginning, ending), in one batch: each result is the same as alone."""
        read = [self.read(beginning, ending, options.max_new_tokens) for beginning, ending in gaps]
        forward = _write(
            self.forward, [gap.beginning for gap in read], options.forward_candidates, options
        )
        backward = _write(
            self.backward, [gap.ending for gap in read], options.backward_candidates, options
        )
        meetings = zip(read, forward, backward, strict=True)
        return [finish(self.meet_steps(*each, options)) for each in meetings]

    def score(
        self,
        beginning: str,
        ending: str,
        middles: Sequence[str],
        options: InfillOptions = InfillOptions(),
    ) -> list[Infill]:
        """Scores of given middles by both models, in their order. Raises PromptError."""
        codec = self.forward.codec
        longest = max((len(codec.encode(middle)) for middle in middles), default=0)
        return finish(self._score(self.read(beginning, ending, longest), middles, options))

    def read(self, beginning: str, ending: str, max_new_tokens: int) -> InfillPrompts:
        """Prompts of a gap of up to `max_new_tokens`. Raises PromptError."""
        gap = InfillPrompts.between(self.forward.codec, self.backward.codec, beginning, ending)
        # Each prompt has a marker, and lacks the token that it holds back.
        lengths = len(gap.before), len(gap.after)
        if sum(lengths) + max_new_tokens > self.context_tokens:
            raise PromptError(
                f"the beginning has {lengths[0]} tokens and the ending {lengths[1]}; with up to "
                f"{max_new_tokens} of the middle they exceed the models' context of "
                f"{self.context_tokens}; shorten them"
            )
        return gap

    def meet_steps(
        self, gap: InfillPrompts, onwards: list[Half], backwards: list[Half], options: InfillOptions
    ) -> Steps[list[Infill]]:
        """Join halves that both models wrote: see `fill`."""
        onwards = [Half((gap.before_held,), is_given=True), *onwards]
        backwards = [Half((gap.after_held,), is_given=True), *backwards]
        ahead, back = self.forward.model, self.backward.model
        joins = yield from best_join_steps(
            onwards,
            backwards,
            (yield from score_half_steps(ahead, gap.before, onwards, gap.after, backwards)),
            (yield from score_half_steps(back, gap.after, backwards, gap.before, onwards)),
            min_tokens=options.min_new_tokens,
            max_tokens=options.max_new_tokens,
            forward_weight=options.forward_weight,
        )
        found = yield from self._different(gap, onwards, backwards, joins, options.rescored)
        scored = yield from self._score(gap, list(found), options)
        infills = [
            replace(one, written_forward=forward, written_backward=backward)
            for one, (forward, backward) in zip(scored, found.values(), strict=True)
        ]
        return sorted(infills, key=lambda one: -one.score)

    @staticmethod
    def _different(
        gap: InfillPrompts,
        onwards: list[Half],
        backwards: list[Half],
        joins: list[Join],
        maximum: int,
    ) -> Steps[dict[str, tuple[int, int]]]:
        """The first distinct middles, with the number of tokens that each model wrote of them."""
        written: dict[str, tuple[int, int]] = {}
        for join in joins:
            ahead, back = onwards[join.forward], backwards[join.backward]
            middle = gap.middle(ahead.ids[: join.forward_cut], back.ids[: join.backward_cut])
            if middle is not None and middle not in written:
                written[middle] = (
                    ahead.new_tokens(join.forward_cut),
                    back.new_tokens(join.backward_cut),
                )
            if len(written) == maximum:
                break
            yield
        return written

    def _score(
        self, gap: InfillPrompts, middles: Sequence[str], options: InfillOptions
    ) -> Steps[list[Infill]]:
        texts = [gap.beginning + middle + gap.ending for middle in middles]
        forward = yield from _after(self.forward, gap.before, texts)
        backward = yield from _after(self.backward, gap.after, texts)
        found = []
        for middle, (ahead, ahead_tokens), (back, back_tokens) in zip(
            middles, forward, backward, strict=True
        ):
            score = mean_per_token(ahead, back, ahead_tokens, back_tokens, options.forward_weight)
            found.append(
                Infill(
                    middle=middle,
                    score=float(score),
                    forward=ahead,
                    backward=back,
                    forward_tokens=ahead_tokens,
                    backward_tokens=back_tokens,
                )
            )
        return found


def load_infiller(
    forward: str | Path,
    backward: str | Path | None = None,
    *,
    device: str | None = None,
    dtype: str = "auto",
    cuda_graphs: bool = True,
) -> Infiller:
    """Two models: folders that `megaback convert` wrote, runs or checkpoints. One of both
    directions gives both, and is named once.

    `device`, `dtype` and `cuda_graphs` are as `megaback.load` takes them.

    Raises CheckpointMissingError, CheckpointCorruptError, BackendError, TokenizerMismatchError,
    DirectionMismatchError.
    """

    def load(folder: str | Path, direction: Direction) -> Reader:
        return Reader.load(
            Path(folder), device, dtype, cuda_graphs=cuda_graphs, direction=direction
        )

    if backward is not None and Path(backward) != Path(forward):
        return Infiller(load(forward, Direction.FORWARD), load(backward, Direction.BACKWARD))
    text_format = read_description(model_folder(forward)).text_format
    if not text_format.both:
        (other,) = set(Direction) - {text_format.direction}
        raise DirectionMismatchError(
            f"the model {forward} writes {text_format.direction.value} only, not {other.value}; "
            "name a model of each direction, or one of both"
        )
    ahead = load(forward, Direction.FORWARD)
    return Infiller(ahead, ahead.reading(Direction.BACKWARD))


def different_halves(samples: Sequence[Sequence[int]]) -> list[Half]:
    """Distinct halves of a model's samples for one prompt."""
    return [Half(ids) for ids in dict.fromkeys(map(tuple, samples)) if ids]


def _write(
    reader: Reader, texts: Sequence[str], count: int, options: InfillOptions
) -> list[list[Half]]:
    """Distinct samples for each text, with the same seeds for each."""
    sampling = replace(options.sampling, max_new_tokens=options.max_new_tokens, stop_ids=())
    prompts = [reader.codec.prompt(text) for text in texts]
    prompts_at_once = max(1, _ROWS_AT_ONCE // max(count, 1))
    halves: list[list[Half]] = []
    for start in range(0, len(prompts), prompts_at_once):
        some = prompts[start : start + prompts_at_once]
        rows = [prompt for prompt in some for _ in range(count)]
        seeds = [sampling.seed + number for _ in some for number in range(count)]
        samples = sample_many(reader.decoder, reader.codec, rows, sampling, seeds)
        halves += [
            different_halves(samples[number * count : (number + 1) * count])
            for number in range(len(some))
        ]
    return halves


def _after(
    reader: Reader, prompt: Sequence[int], texts: Sequence[str]
) -> Steps[list[tuple[float, int]]]:
    """log P(text) - log P(prompt) of each text, encoded as a whole, and its number of tokens.

    If the text's ids begin with those of the prompt, that is log P(the rest | the prompt).
    """
    wholes = []
    for text in texts:
        wholes.append([reader.codec.begin_id, *reader.codec.encode(text).tolist()])
        yield
    shared = [_shared(prompt, whole) for whole in wholes]
    of_texts = yield from log_probability_steps(
        reader.model,
        [Continuation(whole[:at], whole[at:]) for at, whole in zip(shared, wholes, strict=True)],
        TOKENS_AT_ONCE,
    )
    edges = sorted({at for at in shared if at < len(prompt)})
    of_prompts = yield from log_probability_steps(
        reader.model,
        [Continuation(prompt[:at], prompt[at:]) for at in edges],
        TOKENS_AT_ONCE,
    )
    counted_twice = dict(zip(edges, of_prompts, strict=True))
    return [
        (nats - counted_twice.get(at, 0.0), len(whole) - len(prompt))
        for nats, at, whole in zip(of_texts, shared, wholes, strict=True)
    ]


def _shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """Length of the common prefix."""
    for at, (one, other) in enumerate(zip(prompt, whole, strict=False)):
        if one != other:
            return at
    return min(len(prompt), len(whole))
