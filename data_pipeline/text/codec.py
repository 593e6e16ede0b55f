"""Encoding and decoding of text: the only place that handles direction, unit and tokenizer.

`encode` returns ids in the model's reading order; `render` returns text in a person's reading
order. Building, sampling, chat, scoring and export all use this module. It guarantees that
`render(encode(text)) == text` for every Python string, lone surrogates included, and that no text
encodes to a control id.
"""

import hashlib
import re
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import Enum
from functools import cached_property
from itertools import compress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.common.limits import MAX_TOKENIZER_BYTES
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import (
    ConfigError,
    DirectionMismatchError,
    TokenizerError,
    TokenizerMismatchError,
)
from data_pipeline.text.encoder import Encoder, Ids
from data_pipeline.text.open_tokenizer import open_tokenizer
from data_pipeline.text.tokenizer import file_name_of, find_tokenizer

BEGIN_PIECE = "<|startoftext|>"
END_PIECE = "<|endoftext|>"
CHAT_PIECES = (
    "<|im_start|>",
    "<|im_end|>",
    "<|instruction|>",
    "<|response|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
)

# Text that the usual normalizations change: outer and repeated spaces, a ligature, a wide letter.
_PROBE = "  a  \ufb01 \uff21\t\n e\u0301 \u00a0b "
_RUNS = re.compile(r"\s+|\S+")
# The reference encodes this much per piece of the vocabulary in the time that building and checking
# a faster encoder takes.
_CHARACTERS_PER_PIECE = 50


class Direction(str, Enum):
    """Reading order of the model: from the text's end or from its beginning."""

    BACKWARD = "backward"
    FORWARD = "forward"


def direction_of(name: Direction | str | None) -> Direction | None:
    """The direction of this name; None for the default of a model. Raises ConfigError."""
    names = [direction.value for direction in Direction]
    if name is not None and name not in names:
        raise ConfigError(f"`direction` is {name!r}; use {' or '.join(names)}, or omit it")
    return None if name is None else Direction(name)


class Directions(str, Enum):
    """Directions of a model: one, or both."""

    BACKWARD = Direction.BACKWARD.value
    FORWARD = Direction.FORWARD.value
    BOTH = "both"

    @property
    def first(self) -> Direction:
        """The direction in which a model is used by default."""
        return Direction.FORWARD if self is Directions.FORWARD else Direction.BACKWARD


class Unit(str, Enum):
    """Unit of reversal: the ids of a document, or its words before they are encoded."""

    TOKEN = "token"  # noqa: S105 - a unit of text, not a secret
    WORD = "word"


def reverse_words(text: str) -> str:
    """Reverse the sequence of words and of the whitespace runs between them: its own inverse.

    >>> reverse_words("the  cat sat")
    'sat cat  the'
    """
    return "".join(reversed(_RUNS.findall(text)))


@dataclass(frozen=True)
class TextFormat:
    """Direction, unit and tokenizer of an artifact; artifacts used together must agree on them."""

    direction: Direction
    unit: Unit
    tokenizer_sha256: str
    both: bool = False
    """Whether a model has both directions, of which `direction` is the one in use."""

    @property
    def directions(self) -> Directions:
        return Directions.BOTH if self.both else Directions(self.direction.value)

    def to_dict(self) -> dict[str, str]:
        return {
            "direction": self.directions.value,
            "unit": self.unit.value,
            "tokenizer_sha256": self.tokenizer_sha256,
        }

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> "TextFormat":
        """Raises KeyError for a missing field and ValueError for an invalid one."""
        directions = Directions(fields["direction"])
        return cls(
            directions.first,
            Unit(fields["unit"]),
            str(fields["tokenizer_sha256"]),
            both=directions is Directions.BOTH,
        )

    def using(self, direction: Direction, what: str) -> "TextFormat":
        """The format of a model that is used in this direction.

        Raises DirectionMismatchError, with `what` as the model's name, if it has only the other.
        """
        if self.direction is not direction and not self.both:
            raise DirectionMismatchError(
                f"{what} writes {self.direction.value} only, not {direction.value}; give a model "
                "of that direction, or of both"
            )
        return replace(self, direction=direction)

    def as_base_of(self, other: "TextFormat") -> "TextFormat":
        """The format of a model that is trained further as another: of both, one is used."""
        if self.both and not other.both:
            return replace(self, direction=other.direction, both=False)
        return self

    def require_same(self, other: "TextFormat", this: str, that: str) -> None:
        """Raises TokenizerMismatchError or DirectionMismatchError unless the formats are equal.

        `this` and `that` name the two artifacts in the message.
        """
        if self.tokenizer_sha256 != other.tokenizer_sha256:
            raise TokenizerMismatchError(
                f"{this} was made with tokenizer {self.tokenizer_sha256[:12]} and {that} with "
                f"tokenizer {other.tokenizer_sha256[:12]}; use artifacts made with one tokenizer"
            )
        for name, mine, theirs in (
            ("direction", self.directions.value, other.directions.value),
            ("unit", self.unit.value, other.unit.value),
        ):
            if mine != theirs:
                raise DirectionMismatchError(
                    f"{this} has {name} {mine!r} and {that} has {name} {theirs!r}; "
                    f"use artifacts of one {name}"
                )


@dataclass(frozen=True)
class Prompt:
    """Ids to read, ids allowed as the first new one, and the id that ends the text."""

    ids: list[int]
    first_ids: npt.NDArray[np.int64]
    end_id: int
    held_back: bytes = b""
    """Bytes of the given text that are not in `ids`; the first new id contains them."""


class TextCodec:
    """Encodes and renders with one tokenizer, direction and unit.

    Encodes exactly as the tokenizer's library does, with a faster encoder once there is much to
    encode.
    With `both`, for a model of both directions, the begin and end markers are exchanged if it reads
    forward, so that the first id names the direction. Instances are pickled as the serialized
    tokenizer.
    """

    def __init__(
        self, model_bytes: bytes, direction: Direction, unit: Unit, *, both: bool = False
    ) -> None:
        """Raises TokenizerError when the bytes are not a tokenizer that megaback can use."""
        self.model_bytes = model_bytes
        self.format = TextFormat(direction, unit, hashlib.sha256(model_bytes).hexdigest(), both)
        self._tokenizer = tokenizer = open_tokenizer(model_bytes)
        self.vocab_size = tokenizer.vocab_size
        self.id_dtype = tokenizer.id_dtype
        self._piece_bytes = tokenizer.piece_bytes
        self._unencodable = re.compile(f"([{tokenizer.unencodable}\ud800-\udfff]+)")
        self._characters_before_fastest = _CHARACTERS_PER_PIECE * self.vocab_size
        self.begin_id = self._require_control(BEGIN_PIECE)
        self.end_id = self._require_control(END_PIECE)
        if both and direction is Direction.FORWARD:
            self.begin_id, self.end_id = self.end_id, self.begin_id
        self.chat_ids = {piece: self._require_control(piece) for piece in CHAT_PIECES}
        self._writable_ids: dict[int, npt.NDArray[np.int64]] = {}
        if self.render(self.encode(_PROBE)) != _PROBE:
            raise TokenizerError(
                "the tokenizer normalizes characters or spaces, so text cannot be decoded exactly; "
                f"{tokenizer.advice}"
            )

    @classmethod
    def load(
        cls, path: Path, direction: Direction, unit: Unit, *, both: bool = False
    ) -> "TextCodec":
        """Read a tokenizer's file, of either kind. Raises TokenizerError when it cannot be used."""
        try:
            model_bytes = read_file(path, MAX_TOKENIZER_BYTES)
        except OSError as error:
            inside = next(iter(sorted(path.glob("*.model"))), find_tokenizer(path))
            how = "train one with `megaback tokenizer train`"
            advice = f"give {inside}" if inside.is_file() else how
            raise TokenizerError(
                f"cannot read the tokenizer {path}: {error.strerror}; {advice}"
            ) from None
        try:
            return cls(model_bytes, direction, unit, both=both)
        except TokenizerError as error:
            raise TokenizerError(f"{path}: {error}") from None

    @property
    def file_name(self) -> str:
        """Name of the tokenizer's file in a folder."""
        return file_name_of(self.model_bytes)

    def __reduce__(self) -> tuple[Any, tuple[bytes, TextFormat]]:
        return TextCodec.of, (self.model_bytes, self.format)

    @classmethod
    def of(cls, model_bytes: bytes, text_format: TextFormat) -> "TextCodec":
        """The codec of an artifact's format. Raises TokenizerError."""
        return cls(model_bytes, text_format.direction, text_format.unit, both=text_format.both)

    @property
    def encoder_name(self) -> str:
        """Name of the encoder that is used once there is much to encode."""
        return self._fastest.name

    @classmethod
    def load_as(cls, path: Path, text_format: TextFormat) -> "TextCodec":
        """The codec of a model with this tokenizer's file. Raises TokenizerError."""
        return cls.load(path, text_format.direction, text_format.unit, both=text_format.both)

    def newest(self, ids: Sequence[int], num_tokens: int) -> list[int]:
        """The last ids, at most `num_tokens`; for a model of both directions, whose first id names
        the direction, the first of them is the begin marker."""
        newest = list(ids[max(len(ids) - num_tokens, 0) :])
        if self.format.both and newest:
            newest[0] = self.begin_id
        return newest

    def encode(self, text: str) -> Ids:
        """Ids of a text as the model reads it, without markers: shape (tokens,), read-only."""
        (ids,) = self.encode_all([text])
        return ids

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """`encode` of each text, faster; call it with batches of `encoder.in_batches`."""
        if self.reverses_words:
            texts = [reverse_words(text) for text in texts]
        self._characters_before_fastest -= sum(map(len, texts))
        is_much = self._characters_before_fastest <= 0
        encoder = self._fastest if is_much else self._tokenizer.reference
        are_plain = list(map(self._is_plain, texts))
        ids_of_plain = iter(encoder.encode_all(list(compress(texts, are_plain))))
        ids_of_texts = [
            next(ids_of_plain) if is_plain else self._encode_spelled(text, encoder)
            for text, is_plain in zip(texts, are_plain, strict=True)
        ]
        return [ids[::-1] for ids in ids_of_texts] if self.reverses_ids else ids_of_texts

    def encode_document(self, text: str) -> Ids:
        """Ids of a whole document between its begin and end markers: shape (tokens + 2,)."""
        (ids,) = self.encode_documents([text])
        return ids

    def encode_documents(self, texts: Sequence[str]) -> list[Ids]:
        """`encode_document` of each text, faster; call it with batches of `encoder.in_batches`."""
        return [self._between_markers(ids) for ids in self.encode_all(texts)]

    def document_of(self, ids: npt.NDArray[np.integer[Any]]) -> Ids:
        """`encode_document` of ids in the order of the text, all with text: shape (tokens + 2,)."""
        return self._between_markers(ids[::-1] if self.reverses_ids else ids)

    def ids_of(self, document: Ids) -> Ids:
        """Inverse of `document_of`. Raises ValueError unless the document is between markers."""
        if len(document) < 2 or (document[0], document[-1]) != (self.begin_id, self.end_id):
            raise ValueError("it is not between the begin and end markers")
        return document[-2:0:-1] if self.reverses_ids else document[1:-1]

    def render(self, ids: Sequence[int] | npt.NDArray[Any]) -> str:
        """Decode ids in the model's reading order to text in a person's reading order.

        Control ids have no text. Incomplete characters at an end become U+FFFD, so pass all ids of
        a text at once.
        """
        ordered = reversed(ids) if self.reverses_ids else ids
        raw = b"".join([self._piece_bytes[int(piece_id)] for piece_id in ordered])
        try:
            text = raw.decode("utf-8", "surrogatepass")
        except UnicodeDecodeError:
            text = raw.decode("utf-8", "replace")
        return reverse_words(text) if self.reverses_words else text

    def piece(self, piece_id: int) -> str:
        """Spelling of an id, for display."""
        return self._tokenizer.piece(piece_id)

    def piece_bytes(self, piece_id: int) -> bytes:
        """UTF-8 text of an id, which may be a part of a character; b"" for control ids.

        With unit `word`, words are in the model's order.
        """
        return self._piece_bytes[piece_id]

    def piece_num_bytes(self) -> npt.NDArray[np.int64]:
        """Bytes of text per id, 0 for control ids: shape (vocab_size,)."""
        return np.array([len(piece) for piece in self._piece_bytes], dtype=np.int64)

    def prompt(self, given: str) -> "Prompt":
        """Prompt for continuing a given text.

        The piece next to the new text is held back, since it would imply that a word ends
        there (` is` and the `is` within a word are two pieces). The bytes of the first new id
        contain the held-back ones on the given side, so that the given text stays intact and the
        model decides whether the word continues. With unit `word` nothing is held back, and the
        first new id begins with whitespace.
        """
        ids = [self.begin_id, *self.encode(given).tolist()]
        writable = self.writable_ids(self.end_id)
        if len(ids) == 1:
            return Prompt(ids, writable, self.end_id)
        if self.reverses_words:
            return Prompt(ids, self._ids_between_words, self.end_id)
        held_back = self._piece_bytes[ids.pop()]
        return Prompt(ids, self._ids_containing(held_back), self.end_id, held_back)

    def _ids_containing(self, held_back: bytes) -> npt.NDArray[np.int64]:
        """Ids whose bytes end, or in reading order forward begin, with the given ones, sorted."""
        num_bytes, ordered = len(held_back), self._ids_by_text
        searched = held_back[::-1] if self.reverses_ids else held_back

        def start_of(piece_id: int) -> bytes:
            piece = self._piece_bytes[piece_id]
            return piece[-num_bytes:][::-1] if self.reverses_ids else piece[:num_bytes]

        first = bisect_left(ordered, searched, key=start_of)
        return np.sort(ordered[first : bisect_right(ordered, searched, first, key=start_of)])

    @cached_property
    def _ids_by_text(self) -> npt.NDArray[np.int64]:
        """Ids in the order of their bytes, compared from the given text's side."""
        texts, step = self._piece_bytes, -1 if self.reverses_ids else 1
        ordered = sorted(range(self.vocab_size), key=lambda piece_id: texts[piece_id][::step])
        return np.array(ordered, dtype=np.int64)

    @cached_property
    def _ids_between_words(self) -> npt.NDArray[np.int64]:
        """Ids that begin with whitespace, and the end marker."""
        texts, writable = self._piece_bytes, self.writable_ids(self.end_id)
        return np.array([i for i in writable if texts[i][:1].isspace() or i == self.end_id])

    def writable_ids(self, end_id: int) -> npt.NDArray[np.int64]:
        """Ids allowed in a sample: those with text, and the end marker."""
        if end_id not in self._writable_ids:
            allowed = [i for i, piece in enumerate(self._piece_bytes) if piece or i == end_id]
            self._writable_ids[end_id] = np.array(allowed, dtype=np.int64)
        return self._writable_ids[end_id]

    @property
    def reverses_words(self) -> bool:
        return self.format.direction is Direction.BACKWARD and self.format.unit is Unit.WORD

    @property
    def reverses_ids(self) -> bool:
        return self.format.direction is Direction.BACKWARD and self.format.unit is Unit.TOKEN

    @cached_property
    def _fastest(self) -> Encoder:
        return self._tokenizer.fastest

    def _is_plain(self, text: str) -> bool:
        """Whether a text needs no spelling in byte pieces; faster than the regex."""
        if text.isascii():
            return True
        try:
            text.encode()
        except UnicodeEncodeError:
            return False
        return not any(symbol in text for symbol in self._tokenizer.unencodable)

    def _encode_spelled(self, text: str, encoder: Encoder) -> Ids:
        """Ids of a text that has characters spelled in byte pieces."""
        parts = self._unencodable.split(text)
        # Each distinct part is encoded once: a text may alternate half a million times.
        distinct = list(dict.fromkeys(parts[::2]))
        ids_of_distinct = dict(zip(distinct, encoder.encode_all(distinct), strict=True))
        ids_of_parts = [ids_of_distinct[part] for part in parts[::2]]
        byte_ids = self._tokenizer.byte_ids
        spelled = [
            byte_ids[np.frombuffer(part.encode("utf-8", "surrogatepass"), dtype=np.uint8)]
            for part in parts[1::2]
        ]
        together: list[Ids] = [ids_of_parts[0]] * len(parts)
        together[::2], together[1::2] = ids_of_parts, spelled
        return np.concatenate(together)

    def _between_markers(self, ids: npt.NDArray[np.integer[Any]]) -> Ids:
        document = np.empty(len(ids) + 2, dtype=self.id_dtype)
        document[0], document[1:-1], document[-1] = self.begin_id, ids, self.end_id
        return document

    def _require_control(self, piece: str) -> int:
        piece_id = self._tokenizer.control_id(piece)
        if piece_id is None:
            raise TokenizerError(
                f"the tokenizer lacks the control piece {piece}; {self._tokenizer.advice}"
            )
        return piece_id
