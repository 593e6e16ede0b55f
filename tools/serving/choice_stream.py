"""Incremental detokenization of a request's ids into the parts of text that its client gets."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from data_pipeline.text.codec import Direction, Prompt, TextCodec
from data_pipeline.text.incremental import IncrementalDetokenizer, StopTexts
from megaback.inference.batch import Step
from tools.serving import response_schemas

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True)
class Token:
    """A token with its log probability and the likeliest alternatives."""

    piece_id: int
    log_probability: float | None
    """Log probability; None for the first given id, which has no context."""
    likeliest: Sequence[tuple[int, float]]
    text_offset: int


@dataclass(frozen=True)
class Part:
    """Text that later tokens cannot change, with the tokens since the previous part."""

    text: str
    tokens: list[Token]
    finish_reason: FinishReason | None = None
    ids: Sequence[int] = ()
    """New ids since the previous part."""


@dataclass(kw_only=True)
class ChoiceText:
    """State of one choice between steps."""

    codec: TextCodec
    given: str
    prompt: Prompt
    stops: Sequence[str]
    tokens: int = 0
    """Tokens written so far, without the end marker."""
    finish_reason: FinishReason | None = None
    _pending: list[Token] = field(default_factory=list)
    _pending_ids: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._growing = IncrementalDetokenizer(self.codec, self.prompt.held_back)
        leftwards = self._growing.grows_leftwards
        self._stop_texts = StopTexts(self.stops, grows_leftwards=leftwards)
        self._num_characters = 0 if leftwards else len(self.given)

    def add(self, step: Step) -> Part:
        """Parts that a step completes; the last part has the finish reason."""
        if step.is_end:
            return self.finish("stop")
        self.tokens += 1
        self._pending_ids.append(step.new_id)
        text, offset = self._grown(step.new_id)
        if step.log_probability is not None:
            token = Token(step.new_id, step.log_probability, step.likeliest, offset)
            self._pending.append(token)
        text = self._stop_texts.add(text)
        if self._stop_texts.is_found:
            return self._last(text, "stop")
        if step.is_last:
            return self.finish("length", text)
        return Part(text, self._taken(), ids=self._taken_ids()) if text else Part("", [])

    def finish(self, reason: FinishReason, before: str = "") -> Part:
        """The remaining text at the end, joined with the part just before it."""
        rest = self._stop_texts.add(self._growing.finish())
        if not self._stop_texts.is_found:
            rest = self.join([rest, self._stop_texts.finish()])
        else:
            reason = "stop"
        return self._last(self.join([before, rest]), reason)

    def join(self, parts: Sequence[str]) -> str:
        """Parts of this choice in reading order."""
        return "".join(reversed(parts) if self._growing.grows_leftwards else parts)

    def _last(self, text: str, reason: FinishReason) -> Part:
        self.finish_reason = reason
        return Part(text, self._taken(), reason, self._taken_ids())

    def _grown(self, piece_id: int) -> tuple[str, int]:
        """The text that is now final, and the offset of the token's text relative to the prompt."""
        text, before = self._growing.add(piece_id), self._num_characters
        self._num_characters += len(text)
        return text, -self._num_characters if self._growing.grows_leftwards else before

    def _taken(self) -> list[Token]:
        tokens, self._pending = self._pending, []
        return tokens

    def _taken_ids(self) -> list[int]:
        ids, self._pending_ids = self._pending_ids, []
        return ids


def offsets(codec: TextCodec, ids: Sequence[int], text: str) -> list[int]:
    """Offsets of the tokens of a whole text, in the model's order."""
    place = ChoiceText(codec=codec, given="", prompt=codec.prompt(""), stops=[])
    end = len(text) if codec.format.direction is Direction.BACKWARD else 0
    return [end + place._grown(piece_id)[1] for piece_id in ids]


def spelled(codec: TextCodec, piece_id: int) -> str:
    """A token as OpenAI spells it: its text, or its bytes if it is part of a character."""
    raw = codec.piece_bytes(piece_id)
    if not raw:
        return codec.piece(piece_id)
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{value:02x}" for value in raw)


def log_probs(codec: TextCodec, tokens: Sequence[Token]) -> response_schemas.LogProbs:
    """Log probabilities of tokens as a client gets them."""
    tops: list[dict[str, float] | None] = []
    for token in tokens:
        if token.log_probability is None:
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for piece_id, log_probability in (
            *token.likeliest,
            (token.piece_id, token.log_probability),
        ):
            top.setdefault(spelled(codec, piece_id), log_probability)
        tops.append(top)
    return response_schemas.LogProbs(
        tokens=[spelled(codec, token.piece_id) for token in tokens],
        token_logprobs=[token.log_probability for token in tokens],
        top_logprobs=tops if any(token.likeliest for token in tokens) else None,
        text_offset=[token.text_offset for token in tokens],
    )
