"""The two things that every source speaks of: a document, and a slice that holds documents.

A slice can be read without the other slices, by any process; its stamp says whether what it names
is still what was listed.
"""

import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from data_pipeline.errors import BadRecordError, SourceUnreadableError

_STAMPED_BYTES = 64 << 10


@dataclass(frozen=True)
class Document:
    """One text, and where it came from."""

    text: str
    position: str
    """For messages: `web.jsonl:12` (lines from 1), `a.parquet row 7` (rows from 0), a module."""


@dataclass(frozen=True)
class Slice:
    """One independently readable part of a source; `dataclasses.asdict` gives its JSON."""

    kind: str
    """`pydocs`, `parquet`, `jsonl`, `text` or `hub`."""
    path: str
    """An absolute file path; a hub name with its config; `modules` or `topics` of pydocs."""
    start: int
    """First row group, hub shard or pydocs file. Text and jsonl files are never cut: 0 to 1."""
    stop: int
    """One past the last."""
    size_bytes: int
    """Bytes of input, for progress and for balancing; 0 if unknown."""
    stamp: str
    """Hexadecimal digest of the content that was listed."""


def file_stamp(path: Path) -> str:
    """Digest of a file's size and of its first and last 64 KiB. Raises OSError."""
    with path.open("rb") as file:
        head = file.read(_STAMPED_BYTES)
        size_bytes = file.seek(0, os.SEEK_END)
        file.seek(max(0, size_bytes - _STAMPED_BYTES))
        tail = file.read()
    return hashlib.sha256(b"%d:" % size_bytes + head + tail).hexdigest()


def require_stamp(piece: Slice, stamp: str) -> None:
    """Raises SourceUnreadableError when what a slice names has changed since it was listed."""
    if stamp != piece.stamp:
        raise SourceUnreadableError(
            f"{piece.path}: changed since it was listed; "
            "run the command again when nothing writes to the source"
        )


def record_text(record: Mapping[str, object], text_column: str, where: str) -> str:
    """The text of one record. Raises BadRecordError, which begins with `where`."""
    if text_column not in record:
        raise BadRecordError(
            f"{where}: no column {text_column!r}; the columns are {', '.join(record) or 'none'}: "
            "name the one with the text with --text-column, or remove the record"
        )
    text = record[text_column]
    if not isinstance(text, str):
        found = "null" if text is None else f"of type {type(text).__name__}, not text"
        raise BadRecordError(
            f"{where}: column {text_column!r} is {found} "
            f"(the columns are {', '.join(record)}); mend or remove the record"
        )
    return text
