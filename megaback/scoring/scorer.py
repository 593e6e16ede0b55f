"""Scores of question-answer pairs: log P(question | answer), in batches.

A forward model gives log P(answer | question). docs/scoring.md has the formulas.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from enum import Enum
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from data_pipeline.errors import ConfigError, PromptError
from data_pipeline.text.chat_format import ChatFormat
from data_pipeline.text.codec import Direction, TextCodec, direction_of
from megaback.client.connection import Connection
from megaback.client.likelihoods import RemotePool
from megaback.client.servers import connect
from megaback.inference.device_pool import DevicePool, choose_devices
from megaback.inference.likelihood import Continuation, in_packs
from megaback.inference.placement import choose_dtype
from megaback.scoring.pairs import Pair
from megaback.weights.converted import model_folder
from megaback.weights.model_folder import read_description, tokenizer_of

_Carried = TypeVar("_Carried")
_PAIRS_AT_ONCE = 2048  # sorted by length
_WINDOWS_AHEAD = 2


class Form(str, Enum):
    """Format around the two texts."""

    CHAT = "chat"
    """BackChat's markers, as after fine-tuning; whitespace around each text is stripped."""
    PLAIN = "plain"
    """A document in which the answer follows the question directly, as in pretraining."""


@dataclass(frozen=True)
class Score:
    """log P(written | given) in nats, and the length of the written text."""

    log_probability: float
    prior_log_probability: float | None
    """log P(written) by the same model, without the given text."""
    tokens: int
    """Number of tokens, in the chat form with the end marker."""
    text_bytes: int

    @property
    def per_token(self) -> float:
        return self.log_probability / max(self.tokens, 1)

    @property
    def per_byte(self) -> float:
        return self.log_probability / max(self.text_bytes, 1)

    @property
    def log_ratio(self) -> float | None:
        """log P(written | given) / P(written): the information that the given text has."""
        if self.prior_log_probability is None:
            return None
        return self.log_probability - self.prior_log_probability

    def to_dict(self) -> dict[str, Any]:
        """Fields of a record, rounded to the precision of fp32."""
        fields: dict[str, Any] = {
            "log_probability": round(self.log_probability, 5),
            "per_token": round(self.per_token, 6),
            "per_byte": round(self.per_byte, 6),
        }
        if self.prior_log_probability is not None and self.log_ratio is not None:
            fields["prior_log_probability"] = round(self.prior_log_probability, 5)
            fields["log_ratio"] = round(self.log_ratio, 5)
        return {**fields, "tokens": self.tokens, "bytes": self.text_bytes}


@dataclass(frozen=True)
class EncodedPair:
    """The ids of a pair."""

    conditional: Continuation
    prior: Continuation
    text_bytes: int


class PairEncoder:
    """Encodes pairs in one form. The two texts are encoded separately: no token spans both."""

    def __init__(self, codec: TextCodec, form: Form, context_tokens: int) -> None:
        self.codec = codec
        self.form = form
        self.context_tokens = context_tokens
        self._chat = ChatFormat(codec)
        self._prior_ids: tuple[int, ...] = (codec.begin_id,)
        if form is Form.CHAT:
            self._prior_ids = tuple(self._chat.prompt_ids(""))

    @property
    def writes_question(self) -> bool:
        return self.codec.format.direction is Direction.BACKWARD

    def encode(self, pair: Pair) -> EncodedPair:
        """Ids of a pair. Raises PromptError if it does not fit the model's context."""
        given, written = pair.answer, pair.question
        if not self.writes_question:
            given, written = written, given
        if self.form is Form.CHAT:
            given, written = given.strip(), written.strip()
            given_ids = self._chat.prompt_ids(given)
            written_ids = self._chat.written_ids(written)
        else:
            given_ids = [self.codec.begin_id, *self.codec.encode(given).tolist()]
            written_ids = self.codec.encode(written).tolist()
        num_tokens = len(given_ids) + len(written_ids)
        if num_tokens - 1 > self.context_tokens:  # the last one is not read
            raise PromptError(
                f"the two texts have {num_tokens} tokens, more than the model's context of "
                f"{self.context_tokens}; shorten them"
            )
        if not written_ids:
            raise PromptError("the text to score is empty; give a text")
        return EncodedPair(
            Continuation(tuple(given_ids), tuple(written_ids)),
            Continuation(self._prior_ids, tuple(written_ids)),
            len(written.encode("utf-8", "surrogatepass")),
        )


class Scorer:
    """Scores pairs with one model, on one or several devices. Close it, or use it with `with`."""

    def __init__(
        self, encoder: PairEncoder, pool: DevicePool | RemotePool, *, with_prior: bool = True
    ) -> None:
        self.encoder = encoder
        self._pool = pool
        self._with_prior = with_prior

    @property
    def dtype(self) -> str:
        """Data type of the weights: `float32`, `bfloat16`, or that a server does not say it."""
        return self._pool.dtype_name

    def score(self, pairs: Sequence[Pair]) -> list[Score]:
        """The score of each pair. Raises PromptError for one that does not fit the context."""
        encoded = ((None, self.encoder.encode(pair)) for pair in pairs)
        return [score for _, score in self.score_all(encoded)]

    def score_all(
        self, pairs: Iterable[tuple[_Carried, EncodedPair]]
    ) -> Iterator[tuple[_Carried, Score]]:
        """Scores in the order of the pairs, each with its carried value; memory is bounded."""
        iterator = iter(pairs)
        running: deque[tuple[list[tuple[_Carried, EncodedPair]], _Running]] = deque()
        while True:
            window = list(islice(iterator, _PAIRS_AT_ONCE))
            if window:
                running.append((window, self._begin([pair for _, pair in window])))
            if running and (not window or len(running) == _WINDOWS_AHEAD):
                done, computed = running.popleft()
                yield from self._finish(done, computed)
            elif not window:
                return

    def _begin(self, pairs: Sequence[EncodedPair]) -> "_Running":
        wanted = {pair.conditional: 0.0 for pair in pairs}
        if self._with_prior:
            wanted |= {pair.prior: 0.0 for pair in pairs}
        continuations = list(wanted)  # the prior of a repeated text is computed once
        packs = [[continuations[i] for i in numbers] for numbers in in_packs(continuations)]
        return [(pack, self._pool.submit(pack)) for pack in packs]

    def _finish(
        self, window: list[tuple[_Carried, EncodedPair]], running: "_Running"
    ) -> Iterator[tuple[_Carried, Score]]:
        found: dict[Continuation, float] = {}
        for pack, future in running:
            found |= zip(pack, self._pool.result(future), strict=True)
        for carried, pair in window:
            prior = found[pair.prior] if self._with_prior else None
            tokens = len(pair.conditional.written)
            yield carried, Score(found[pair.conditional], prior, tokens, pair.text_bytes)

    def close(self) -> None:
        self._pool.close()

    def __enter__(self) -> "Scorer":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


_Running = list[tuple[list[Continuation], "Future[list[float]]"]]


def load_scorer(
    folder: str | Path,
    *,
    form: Form | str = Form.CHAT,
    device: str | None = None,
    dtype: str = "auto",
    with_prior: bool = True,
    direction: Direction | str | None = None,
    server: str | None = None,
    server_model: str | None = None,
) -> Scorer:
    """A scorer with the model in a folder that `megaback convert --to full` or `--to hf` wrote, or
    of a run or a checkpoint, which is converted beside it, once.

    `form`: `chat` or `plain` (docs/scoring.md). `device`: names separated by commas; by default
    every GPU, or else the CPU. `dtype`: as `megaback.load` takes it. `with_prior`: also score the
    written text alone, for `Score.log_ratio`. `direction`: as `megaback.load` takes it.
    `server`: address of a `megaback serve` or a vLLM that has the model, by the name
    `server_model`, and computes in place of `device`.
    Raises ConfigError, CheckpointMissingError, CheckpointCorruptError, BackendError,
    DirectionMismatchError, TokenizerMismatchError, ServeError.
    """
    if form not in list(Form):
        raise ConfigError(f"`form` is {form!r}; use {' or '.join(Form)}")
    folder = model_folder(folder)
    description = read_description(folder, direction_of(direction))
    codec = TextCodec.load_as(tokenizer_of(folder), description.text_format)
    if server is not None:
        if device is not None or dtype != "auto":
            raise ConfigError("`server` computes; omit `device` and `dtype`")
        served = connect(Connection(server), codec, server_model)
        encoder = PairEncoder(codec, Form(form), served.context_tokens - 1)  # the last id is read
        return Scorer(encoder, RemotePool(served), with_prior=with_prior)
    if server_model is not None:
        raise ConfigError("`server_model` names a model of a server; add `server`")
    encoder = PairEncoder(codec, Form(form), description.context_tokens)
    devices = choose_devices(device)
    pool = DevicePool(folder, devices, choose_dtype(dtype, devices[0]))
    return Scorer(encoder, pool, with_prior=with_prior)
