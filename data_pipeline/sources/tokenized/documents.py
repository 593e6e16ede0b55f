"""Documents that another program has tokenized: markers removed, and every id checked.

An id outside the vocabulary, or without text within a document, is a malformed record: it would be
changed or lost. Ids stay as they are; their text is looked up only for the hash that decides the
split, which is thus that of the same document built from its text.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.common.number_ranges import TOKEN_ID
from data_pipeline.errors import BadRecordError, ConfigError
from data_pipeline.sources.documents import Document, OnBadRecord, TokenizedText
from data_pipeline.sources.record_limits import TOO_LONG
from data_pipeline.text.codec import TextCodec

AnyIds = npt.NDArray[np.integer[Any]]

ID_TYPES = ("uint16", "uint32", "int32", "int64")
"""Types of ids that files may leave open."""
_LOOKUP_IDS = 1 << 15
"""Ids looked up at once, within the caches of a core."""


@dataclass(frozen=True)
class TokenizedFormat:
    """Properties of tokenized files that the files do not name."""

    end_id: int
    """Id between documents."""
    begin_id: int
    """Id at the beginning of documents; it may be missing there."""
    flat_type: str = "uint16"
    """Type of the ids of flat files, as of nanoGPT."""
    bytes_type: str = "int64"
    """Type of the ids in a column of bytes of MDS."""
    column: str = "tokens"
    """Column of MDS."""
    joined: bool = False
    """Whether documents continue from one sample of MDS to the next."""

    def __post_init__(self) -> None:
        """Raises ConfigError for a value out of range."""
        for name in ("end_id", "begin_id"):
            if (problem := TOKEN_ID.problem(getattr(self, name))) is not None:
                raise ConfigError(f"`{name}` is {getattr(self, name)}, {problem}")
        for name in ("flat_type", "bytes_type"):
            if getattr(self, name) not in ID_TYPES:
                raise ConfigError(
                    f"`id_type` is {getattr(self, name)!r}; use {', '.join(ID_TYPES)}"
                )


@dataclass(frozen=True)
class RawDocument:
    """Ids as a file has them, in the order of the text, perhaps with markers around them."""

    ids: AnyIds
    place: str
    """File and document, for messages."""
    loss: AnyIds | None = None
    """Loss mask, one number per id."""


RawItem = RawDocument | Document | BadRecordError
"""A document of ids, one of text, or why there is none."""


class _TextOfIds:
    """Text of ids, looked up by numpy, which is faster than joining the bytes of pieces."""

    def __init__(self, codec: TextCodec) -> None:
        pieces = [codec.piece_bytes(piece_id) for piece_id in range(codec.vocab_size)]
        self.num_bytes = codec.piece_num_bytes()
        """Bytes of each id: shape (vocab_size,)."""
        self._starts = np.cumsum(self.num_bytes) - self.num_bytes
        self._bytes = np.frombuffer(b"".join(pieces), np.uint8)

    def __call__(self, ids: AnyIds) -> bytes:
        """The joined text of ids within the vocabulary."""
        starts = range(0, len(ids), _LOOKUP_IDS)
        return b"".join(self._text(ids[start : start + _LOOKUP_IDS]) for start in starts)

    def _text(self, ids: AnyIds) -> bytes:
        num_bytes = self.num_bytes[ids]
        ends = np.cumsum(num_bytes)
        positions = np.repeat(self._starts[ids] - (ends - num_bytes), num_bytes)
        positions += np.arange(len(positions))
        text: bytes = self._bytes[positions].tobytes()
        return text


class DocumentChecker:
    """Makes documents of raw ones, with the text of each id from a codec."""

    def __init__(self, form: TokenizedFormat, codec: TextCodec, max_record_bytes: int) -> None:
        """Raises ConfigError when a marker is an id with text."""
        self._form = form
        self._piece_of = codec.piece
        self._vocab_size = codec.vocab_size
        self._text = _TextOfIds(codec)
        self._max_bytes = max_record_bytes
        for name, marker in (("end_id", form.end_id), ("begin_id", form.begin_id)):
            if marker < codec.vocab_size and (text := codec.piece_bytes(marker)):
                raise ConfigError(
                    f"`{name}` is {marker}, which has the text {text!r} with this "
                    "tokenizer, and would be lost; give the id of a marker"
                )

    def documents(self, items: Iterable[RawItem], on_bad_record: OnBadRecord) -> Iterator[Document]:
        """The documents, checked; malformed ones are passed to `on_bad_record`."""
        for item in items:
            try:
                if isinstance(item, BadRecordError):
                    raise item
                document = item if isinstance(item, Document) else self._checked(item)
            except BadRecordError as error:
                on_bad_record(error)
            else:
                yield document

    def _checked(self, raw: RawDocument) -> Document:
        """Raises BadRecordError naming file, document and offset."""
        ids = raw.ids
        if raw.loss is not None and not raw.loss.all():
            offset = int(np.argmin(raw.loss != 0))
            raise BadRecordError(
                f"{raw.place}: no loss on its token {offset:,}, and documents have no masks; "
                "remove the mask to train on all of its tokens, or build instruction examples with "
                "`megaback instruct build`",
                "loss mask",
            )
        first = int(len(ids) > 0 and ids[0] == self._form.begin_id)
        stop = len(ids) - int(len(ids) > first and ids[-1] == self._form.end_id)
        within = ids[first:stop]
        if len(within):
            self._require_known(within, raw.place, first)
        text_bytes = self._text.num_bytes[within]
        if int(text_bytes.sum()) > self._max_bytes:
            raise too_long(raw.place, self._max_bytes, self._form)
        if not text_bytes.all():
            self._refuse_id(within, int(np.argmin(text_bytes)), raw.place, first)
        return Document("", raw.place, tokenized=TokenizedText(within, self._text(within)))

    def _require_known(self, ids: AnyIds, place: str, first: int) -> None:
        if int(ids.min()) < 0 or int(ids.max()) >= self._vocab_size:
            offset = int(np.argmax((ids < 0) | (ids >= self._vocab_size)))
            raise BadRecordError(
                f"{place}: id {ids[offset]} at its token {offset + first:,} is outside the "
                f"vocabulary of {self._vocab_size:,} ids; give the tokenizer and the type of ids "
                "(`id_type`) with which the file was written",
                "id outside the vocabulary",
            )

    def _refuse_id(self, ids: AnyIds, offset: int, place: str, first: int) -> None:
        """Raises BadRecordError for an id without text."""
        found = int(ids[offset])
        is_end = found == self._form.end_id
        advice = (
            "if its samples are rows of joined documents, set `joined`"
            if is_end
            else f"if it ends documents, set `end_id` to {found}; if it begins them, `begin_id`"
        )
        raise BadRecordError(
            f"{place}: id {found} ({self._piece_of(found)!r}) at its token {offset + first:,} has "
            f"no text, and would be lost; {advice}; or remove the document",
            "end id within a document" if is_end else "id without text within a document",
        )


def too_long(place: str, max_bytes: int, form: TokenizedFormat) -> BadRecordError:
    """The error for a document of more text than `max_record_bytes`."""
    return BadRecordError(
        f"{place}: longer than `max_record_bytes` {max_bytes} allows; if id {form.end_id} is not "
        "between its documents, give that as `end_id`, else raise the limit if there is memory for "
        "20 times as much",
        TOO_LONG,
    )


def cut(
    chunks: Iterable[AnyIds],
    end_id: int,
    stop: Callable[[], float],
    max_tokens: int,
    *,
    position: int = 0,
    skips_first: bool = False,
) -> Iterator[tuple[int, AnyIds | None]]:
    """Cut a stream at its end ids: the first token of each document, and its ids without them.

    Documents that begin before `stop()` are given whole, None in place of more than `max_tokens`.
    An end id at the beginning of the stream begins its first document; the last one needs none.
    The chunks begin at `position` of the stream; with `skips_first` within a document, which is
    skipped.
    """
    parts: list[AnyIds] = []
    start = position
    num_tokens = 0
    for chunk in chunks:
        begin = 0
        for end in np.flatnonzero(chunk == end_id).tolist():
            is_first = position + end == 0
            num_tokens += end - begin
            if not skips_first and not is_first:
                parts.append(chunk[begin:end])
                yield start, np.concatenate(parts) if num_tokens <= max_tokens else None
            skips_first = False
            parts, num_tokens, begin = [], 0, end + 1
            start = position + begin
            if start >= stop():
                return
        position += len(chunk)
        num_tokens += len(chunk) - begin
        if num_tokens > max_tokens or skips_first:
            parts = []  # not held in memory
        else:
            parts.append(chunk[begin:])
        if skips_first and position >= stop():
            return
    if num_tokens and not skips_first:
        yield start, np.concatenate(parts) if num_tokens <= max_tokens else None
