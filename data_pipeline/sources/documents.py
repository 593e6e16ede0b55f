"""Documents, and slices of sources that contain them.

Slices are read independently, by any process; a slice's stamp detects changes since listing.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.common.shown_names import shown_names
from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.redaction import place_of, shown_url
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.record_limits import is_longer, too_long


@dataclass(frozen=True)
class TokenizedText:
    """Ids of a document that another program has tokenized, without markers, and their text."""

    ids: npt.NDArray[np.integer[Any]]
    """Ids in the order of the text: shape (tokens,)."""
    utf8: bytes
    """Text of the ids; where they cut a character, no whole UTF-8."""


@dataclass(frozen=True)
class Document:
    """A text, its position in the source, and its metadata."""

    text: str
    position: str
    """Position for messages: `web.jsonl:12` (lines from 1), `a.parquet row 7` (rows from 0), a
    module."""
    language: str | None = None
    """Language of the text, only when `Columns.language` asks for it."""
    language_score: float | None = None
    """Score of the language, only when `Columns.language_score` asks for it."""
    response: str | None = None
    """Response to an instruction, which is the text then: only when `ExampleColumns` asks for
    it."""
    excluded: tuple[tuple[str, str], ...] = ()
    """Cause and place of each skipped part of its record."""
    tokenized: TokenizedText | None = None
    """Ids in place of the text, which is "" then."""

    @property
    def content(self) -> bytes:
        """Identity of the document: UTF-8 of the text and, after a NUL, the response."""
        if self.tokenized is not None:
            return self.tokenized.utf8
        text = self.text if self.response is None else f"{self.text}\0{self.response}"
        return text.encode("utf-8", "surrogatepass")


@dataclass(frozen=True)
class Columns:
    """Columns or keys of a record that are read. None: not read."""

    text: str = "text"
    language: str | None = None
    language_score: str | None = None
    html: bool = False
    """Whether the text of HTML pages is read."""


AnyColumns = Columns | ExampleColumns
OnBadRecord = Callable[[BadRecordError], None]
"""Handler of malformed records: raises the error, or returns to skip the record."""


def stop_at_bad_record(error: BadRecordError) -> None:
    """Raises the error."""
    raise error


def stop_or_skip(error: BadRecordError) -> None:
    """Raises the error, with advice to use --on-bad-record."""
    raise BadRecordError(
        f"{error}; or skip and count such records with `on_bad_record` skip",
        error.cause,
        error.place,
    )


@dataclass(frozen=True, kw_only=True)
class Slice:
    """An independently readable part of a source; `dataclasses.asdict` is its JSON."""

    kind: str
    """`novels`, `pydocs`, `parquet`, `jsonl`, `text`, `lines` (of text), `html`, `zip` or `hub`;
    of tokenized sources, `ids`, `megatron`, `datatrove` or `mds`."""
    path: str
    """Absolute path or URL; hub name with its config; a novel; `modules` or `topics` of pydocs; a
    pattern of files of ids."""
    start: int
    """First row group, hub shard, file of pydocs or of a zip; of tokenized sources, the first id,
    document or shard. Other files are never cut: 0 to 1."""
    stop: int
    """One past the last."""
    size_bytes: int
    """Bytes of input, for progress and for balancing; 0 if unknown."""
    stamp: str
    """Hexadecimal digest of the content that was listed."""

    @property
    def identity(self) -> tuple[str, str, int, int, int, str]:
        """Identity of its content, without login and signature."""
        return (
            self.kind,
            place_of(self.path),
            self.start,
            self.stop,
            self.size_bytes,
            self.stamp,
        )


def require_stamp(piece: Slice, stamp: str) -> None:
    """Raises SourceUnreadableError when a slice's content has changed since listing."""
    if stamp != piece.stamp:
        raise SourceUnreadableError(
            f"{shown_url(piece.path)}: changed since it was listed; "
            "restore it, or list the source again: run the command again, after "
            "`megaback shards plan --overwrite` if `megaback shards plan` made the plan"
        )


def documents_of(
    record: Mapping[str, object], columns: AnyColumns, where: str, position: str
) -> list[Document]:
    """The document of one record, or its examples. Raises BadRecordError, prefixed with `where`."""
    if isinstance(columns, ExampleColumns):
        found = columns.read(record, where)
        documents = [
            Document(example.instruction, position, response=example.response)
            for example in found.examples
        ]
        documents[0] = replace(documents[0], excluded=tuple(found.excluded))
        return documents
    text = _value(record, columns.text, "text", "`text_column`", where)
    if not isinstance(text, str):
        raise _bad_value(record, columns.text, text, "text", where)
    language = _language(record, columns.language, where) if columns.language else None
    score = _score(record, columns.language_score, where) if columns.language_score else None
    return [Document(text=text, position=position, language=language, language_score=score)]


def require_short(documents: Iterable[Document], where: str, max_record_bytes: int) -> None:
    """Raises BadRecordError, prefixed with `where`, when one of a record's texts is too long."""
    for document in documents:
        if any(is_longer(text, max_record_bytes) for text in (document.text, document.response)):
            raise too_long(where, max_record_bytes)


def require_no_columns(columns: AnyColumns, source: str) -> None:
    """Raises SourceUnreadableError when columns of a source without columns are requested."""
    if isinstance(columns, ExampleColumns):
        raise SourceUnreadableError(
            f"{source}: this source has no columns, so no instructions; "
            "name a jsonl or parquet file, or a data set on the hub"
        )
    asked = {
        "`language_column`": columns.language,
        "`language_score_column`": columns.language_score,
    }
    for option, column in asked.items():
        if column is not None:
            raise SourceUnreadableError(
                f"{source}: this source has no columns, so no column {column!r}; omit {option}"
            )


def require_columns(columns: AnyColumns, found: Iterable[str], source: str) -> None:
    """Raises SourceUnreadableError when a source lacks a requested column."""
    if isinstance(columns, ExampleColumns):
        columns.found_in(found, source)
        return
    names = list(found)
    for column, option, content in asked_columns(columns):
        if column not in names:
            raise SourceUnreadableError(
                f"{source}: no column {column!r}; the columns are {shown_names(names)}: "
                f"name the one with the {content} with {option}"
            )


def asked_columns(columns: Columns) -> Iterator[tuple[str, str, str]]:
    """Name, option and content of each requested column."""
    yield columns.text, "`text_column`", "text"
    if columns.language is not None:
        yield columns.language, "`language_column`", "language"
    if columns.language_score is not None:
        yield columns.language_score, "`language_score_column`", "language's score"


def _language(record: Mapping[str, object], column: str, where: str) -> str | None:
    value = _value(record, column, "language", "`language_column`", where)
    if value is None or isinstance(value, str):
        return value
    raise _bad_value(record, column, value, "text", where)


def _score(record: Mapping[str, object], column: str, where: str) -> float | None:
    value = _value(record, column, "language's score", "`language_score_column`", where)
    if value is None:
        return None
    if isinstance(value, int | float | Decimal) and not isinstance(value, bool):
        try:
            score = float(value)
        except OverflowError:  # an integer of hundreds of digits
            score = math.inf
        if math.isfinite(score):
            return score
        raise _bad_value(record, column, value, "a finite number", where)
    raise _bad_value(record, column, value, "a number", where)


def _value(
    record: Mapping[str, object], column: str, content: str, option: str, where: str
) -> object:
    if column not in record:
        raise BadRecordError(
            f"{where}: no column {column!r}; the columns are {shown_names(record)}: "
            f"name the one with the {content} with {option}, or remove the record",
            f"no column {column!r}",
        )
    return record[column]


def _bad_value(
    record: Mapping[str, object], column: str, value: object, wanted: str, where: str
) -> BadRecordError:
    found = "null" if value is None else f"of type {type(value).__name__}, not {wanted}"
    return BadRecordError(
        f"{where}: column {column!r} is {found} "
        f"(the columns are {shown_names(record)}); fix or remove the record",
        f"column {column!r} is {found}",
    )
