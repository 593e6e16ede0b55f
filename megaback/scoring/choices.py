"""Likelihoods of answers to questions as evaluation harnesses ask for them, in both directions.

A choice is a context and its continuation, which together are one text. A forward model scores
log P(continuation | context), on the tokens of lm_eval's `hf` model. A backward model reads the
continuation first and scores log P(context | continuation), on the ids of the joined text, as in
training. docs/evaluation.md has the formulas.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum

from data_pipeline.errors import ConfigError, PromptError
from data_pipeline.text.codec import Direction, TextCodec
from megaback.inference.device_pool import DevicePool
from megaback.inference.likelihood import Continuation, Likelihood, in_packs

AT_ONCE = 2048
"""Number of continuations that are sorted by length together."""

LikelihoodsOf = Callable[[Sequence[Continuation]], list[Likelihood]]
"""Function that computes, on the devices of this machine or on a server."""

_HEAD = re.compile(r"\S*")


class Scoring(str, Enum):
    """Score of a choice by a backward model; Q is the context and A the continuation.

    The first three are paradigms 3, 2 and 1 of Zhang et al., "Reversal Blessing" (2025).
    """

    QUESTION = "question"
    """log P(Q | A)."""
    JOINT = "joint"
    """log P(Q | A) + log P(A)."""
    NORMALIZED = "normalized"
    """log P(Q | A) / tokens of Q + log P(A)."""
    RATIO = "ratio"
    """log P(Q | A) - log P(Q)."""

    @property
    def needs_answer(self) -> bool:
        return self in (Scoring.JOINT, Scoring.NORMALIZED)


@dataclass(frozen=True)
class Choice:
    """Two texts; `context + continuation` is the whole one."""

    context: str
    continuation: str


@dataclass(frozen=True)
class EncodedChoice:
    """Ids in the model's reading order: those given, with the begin marker, and those scored."""

    given: tuple[int, ...]
    scored: tuple[int, ...]
    num_cut: int = 0
    """Number of ids that did not fit the model's context and are in neither."""

    @property
    def conditional(self) -> Continuation:
        return Continuation(self.given, self.scored)

    @property
    def num_tokens(self) -> int:
        return len(self.given) + len(self.scored) - 1  # the last one is not read


@dataclass(frozen=True)
class ChoiceScore:
    """log P(scored | given) in nats, and the priors that were asked for."""

    log_probability: float
    is_greedy: bool
    """Whether greedy decoding of the given text writes the scored one."""
    tokens: int
    """Number of scored ids."""
    given_log_probability: float | None = None
    """log P(given)."""
    prior_log_probability: float | None = None
    """log P(scored), with nothing given."""

    def value(self, scoring: Scoring) -> float:
        """The score; its prior must have been computed."""
        if scoring is Scoring.QUESTION:
            return self.log_probability
        if scoring is Scoring.RATIO:
            assert self.prior_log_probability is not None
            return self.log_probability - self.prior_log_probability
        assert self.given_log_probability is not None
        question = self.log_probability
        if scoring is Scoring.NORMALIZED:
            question /= max(self.tokens, 1)
        return question + self.given_log_probability


class ChoiceEncoder:
    """Encodes choices for a model of one direction."""

    def __init__(self, codec: TextCodec, context_tokens: int) -> None:
        self.codec = codec
        self.context_tokens = context_tokens

    @property
    def is_backward(self) -> bool:
        return self.codec.format.direction is Direction.BACKWARD

    def encode_all(self, choices: Sequence[Choice]) -> list[EncodedChoice]:
        """Ids of each. What does not fit the context is cut from the context's beginning.

        A forward model then reads less of the context. A backward model scores less of it, equally
        much for all continuations of one context. Raises PromptError for a continuation that alone
        does not fit, and for one without ids.
        """
        encoded = [self._encode(choice) for choice in choices]
        if not self.is_backward:
            return [self._forward_cut(one) for one in encoded]
        rooms: dict[str, int] = {}
        for choice, one in zip(choices, encoded, strict=True):
            room = self.context_tokens + 1 - len(one.given)
            rooms[choice.context] = min(room, rooms.get(choice.context, room))
        return [
            _backward_cut(one, rooms[choice.context], self.context_tokens)
            for choice, one in zip(choices, encoded, strict=True)
        ]

    def document_windows(self, text: str) -> list[Continuation]:
        """Windows that together score every id of a document but its markers, once each.

        As lm_eval's rolling windows: all but the last one begin after a single id, and the last
        one has as much context as fits.
        """
        ids, length = self.codec.encode(text).tolist(), self.context_tokens
        windows = [Continuation((self.codec.begin_id,), tuple(ids[:length]))] if ids else []
        # A model of both directions needs its marker in place of the first id of a window.
        step = length - self.codec.format.both
        for start in range(length, len(ids), step):
            stop = min(start + step, len(ids))
            given = ids[stop - length - 1 : start]
            given = self.codec.newest(given, len(given))
            windows.append(Continuation(tuple(given), tuple(ids[start:stop])))
        return windows

    def _encode(self, choice: Choice) -> EncodedChoice:
        context = choice.context.rstrip()
        continuation = choice.context[len(context) :] + choice.continuation
        whole = [self.codec.begin_id, *self.codec.encode(context + continuation).tolist()]
        if self.is_backward:
            num_given = 1 + self._num_ids_within(continuation if context else None, whole[1:])
            if num_given == len(whole):
                raise PromptError(
                    "the context is empty, so a backward model has nothing to score; use a task "
                    "whose contexts have text, or a forward model"
                )
            return EncodedChoice(tuple(whole[:num_given]), tuple(whole[num_given:]))
        given = [self.codec.begin_id, *self.codec.encode(context).tolist()]
        if len(whole) <= len(given):
            raise PromptError(
                f"the continuation {choice.continuation!r} adds no token to its context; give a "
                "longer one"
            )
        return EncodedChoice(tuple(given), tuple(whole[len(given) :]))

    def _num_ids_within(self, continuation: str | None, ids: Sequence[int]) -> int:
        """Number of first ids of a text, in reading order, that lie within its continuation."""
        if continuation is None:
            return len(ids)
        if self.codec.reverses_words:
            # A word that the boundary divides is read as one, after the rest.
            continuation = continuation[_HEAD.match(continuation).end() :]  # type: ignore[union-attr]
        room = len(continuation.encode("utf-8", "surrogatepass"))
        for number, one in enumerate(ids):
            room -= len(self.codec.piece_bytes(one))
            if room < 0:
                return number
        return len(ids)

    def _forward_cut(self, one: EncodedChoice) -> EncodedChoice:
        room = self.context_tokens + 1 - len(one.scored)
        if room < 1:
            raise PromptError(_too_long(len(one.scored), self.context_tokens))
        num_cut = max(0, len(one.given) - room)
        given = self.codec.newest(one.given, room)
        return EncodedChoice(tuple(given), one.scored, num_cut)


def _backward_cut(one: EncodedChoice, room: int, context_tokens: int) -> EncodedChoice:
    if room < 1:
        raise PromptError(_too_long(len(one.given) - 1, context_tokens))
    scored = one.scored[:room]
    return EncodedChoice(one.given, scored, len(one.scored) - len(scored))


def _too_long(num_tokens: int, context_tokens: int) -> str:
    return (
        f"a continuation has {num_tokens} tokens, and with a context it does not fit the model's "
        f"context of {context_tokens}; exclude the row, or use a model of a longer context"
    )


def score_choices(
    encoded: Sequence[EncodedChoice],
    likelihoods_of: LikelihoodsOf,
    *,
    with_given: bool = False,
    with_prior: bool = False,
) -> list[ChoiceScore]:
    """Score each choice. `with_given`: also log P(given); `with_prior`: also log P(scored)."""
    nothing = Continuation(encoded[0].given[:1], ()) if encoded else None
    wanted = dict.fromkeys(one.conditional for one in encoded)
    if with_given:
        wanted |= dict.fromkeys(_alone(one.given[1:], one) for one in encoded)
    if with_prior:
        wanted |= dict.fromkeys(_alone(one.scored, one) for one in encoded)
    wanted.pop(nothing, None)  # type: ignore[arg-type]
    found = dict(zip(wanted, likelihoods_of([*wanted]), strict=True))
    if nothing is not None:
        found[nothing] = Likelihood(0.0, is_greedy=True)
    return [
        ChoiceScore(
            found[one.conditional].log_probability,
            found[one.conditional].is_greedy,
            len(one.scored),
            found[_alone(one.given[1:], one)].log_probability if with_given else None,
            found[_alone(one.scored, one)].log_probability if with_prior else None,
        )
        for one in encoded
    ]


def _alone(ids: tuple[int, ...], one: EncodedChoice) -> Continuation:
    return Continuation(one.given[:1], ids)


def pool_likelihoods(pool: DevicePool) -> LikelihoodsOf:
    """Likelihoods by the devices of a pool, in batches sorted by length."""

    def likelihoods_of(continuations: Sequence[Continuation]) -> list[Likelihood]:
        found: dict[int, Likelihood] = {}
        running = []
        for numbers in in_packs(continuations):
            pack = [continuations[number] for number in numbers]
            running.append((numbers, pool.submit_likelihoods(pack)))
        for numbers, future in running:
            found |= zip(numbers, pool.result(future), strict=True)
        return [found[number] for number in range(len(continuations))]

    return likelihoods_of


def require_scoring(name: str | None, direction: Direction) -> Scoring:
    """The scoring of this name, or the default. Raises ConfigError for one that does not apply."""
    if name is not None and name not in list(Scoring):
        raise ConfigError(f"`scoring` is {name!r}; use {', '.join(Scoring)}")
    if name is not None and direction is Direction.FORWARD:
        raise ConfigError(
            f"`scoring` is {name!r}, but the model writes forward: its score is always "
            "log P(continuation | context); omit it"
        )
    return Scoring(name or Scoring.QUESTION)
