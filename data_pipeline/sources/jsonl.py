"""JSON Lines from files, compressed or not, and from stdin.

Malformed records are reported with file and line. `-` is stdin, and for output stdout.
"""

import codecs
import json
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from data_pipeline.errors import BadRecordError, SourceMissingError, SourceUnreadableError
from data_pipeline.sources.decompression import CORRUPT_ERRORS, blocks, corrupt, decompressed
from data_pipeline.sources.encodings import as_utf8
from data_pipeline.sources.record_limits import (
    DEFAULT_MAX_RECORD_BYTES,
    holds_too_many_values,
    too_long,
)

STANDARD_STREAM = "-"


@dataclass(frozen=True)
class Record:
    """An object, and its place: `FILE:LINE`, with lines from 1."""

    where: str
    fields: dict[str, Any]


def read_records(
    path: str, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
) -> "Iterator[Record | BadRecordError]":
    """Records of a file, or of stdin for `-`; errors in place of malformed lines.

    Blank lines are skipped; files with a suffix of `COMPRESSIONS` are decompressed. Raises
    SourceMissingError, SourceUnreadableError.
    """
    if path == STANDARD_STREAM:
        yield from _records(blocks(sys.stdin.buffer), "stdin", max_record_bytes)
        return
    if not path:  # Path("") is the working directory
        raise SourceMissingError("(empty): no such file; name a file of JSON lines, or - for stdin")
    try:
        with Path(path).open("rb") as stream:
            chunks = decompressed(stream, PurePath(path).suffix, path, max_record_bytes)
            yield from _records(chunks, path, max_record_bytes)
    except UnicodeDecodeError as error:
        raise SourceUnreadableError(
            f"{path}: not valid {error.encoding.upper()} throughout; convert the file to UTF-8"
        ) from None
    except FileNotFoundError:
        raise SourceMissingError(
            f"{path}: no such file; name a file of JSON lines, or - for stdin"
        ) from None
    except CORRUPT_ERRORS as error:
        raise corrupt(path, error) from None
    except OSError as error:
        raise SourceUnreadableError(
            f"{path}: {error.strerror or error}; check that the file exists and is readable"
        ) from None


def line_of(fields: dict[str, Any]) -> bytes:
    """One line in ASCII, which can represent any string, lone surrogates included."""
    return json.dumps(fields).encode() + b"\n"


def parse_record(
    line: bytes | None, where: str, max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES
) -> dict[str, Any]:
    """The object of a line; None: a line that is too long.

    Raises BadRecordError, prefixed with `where`.
    """
    if line is None:
        raise too_long(where, max_record_bytes)
    if holds_too_many_values(line, max_record_bytes):
        raise too_long(where, max_record_bytes, "more values than")
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise not_decodable(where, error) from None
    except (ValueError, RecursionError) as error:  # also for long numbers and deep nesting
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"{getattr(error, 'msg', error)}{place}"
        raise BadRecordError(
            f"{where}: not valid JSON ({reason}); fix or remove the line, "
            "which must be one JSON object",
            "not valid JSON",
        ) from None
    return require_object(record, where)


def require_object(value: object, where: str) -> dict[str, Any]:
    """Raises BadRecordError, prefixed with `where`, unless the value is an object."""
    if not isinstance(value, dict):
        raise BadRecordError(
            f"{where}: a JSON {type(value).__name__}, not an object with columns; "
            "write one object per line",
            "not a JSON object",
        )
    return value


def lines(chunks: Iterable[bytes], max_bytes: int) -> Iterator[tuple[int, bytes | None]]:
    """Numbered non-blank lines, from 1, without newline or byte order mark.

    Only b"\\n" ends a line. Any line may begin with a byte order mark, since files may be joined. A
    line longer than `max_bytes` is None.
    """
    for number, marked in enumerate(_split(chunks, max_bytes), start=1):
        line = marked.removeprefix(codecs.BOM_UTF8) if marked is not None else None
        if line is None or (line and not line.isspace()):
            yield number, line


def not_decodable(where: str, error: UnicodeDecodeError) -> BadRecordError:
    """The error for undecodable bytes."""
    value = error.object[error.start]
    encoding = error.encoding.upper()
    return BadRecordError(
        f"{where}: byte 0x{value:02X} is not valid {encoding}; convert the file to UTF-8",
        f"not valid {encoding}",
    )


def _records(
    chunks: Iterable[bytes], shown: str, max_record_bytes: int
) -> "Iterator[Record | BadRecordError]":
    for number, line in lines(as_utf8(iter(chunks)), max_record_bytes):
        where = f"{shown}:{number}"
        try:
            yield Record(where, parse_record(line, where, max_record_bytes))
        except BadRecordError as error:
            yield error


def _split(chunks: Iterable[bytes], max_bytes: int) -> Iterator[bytes | None]:
    parts: list[bytes] = []
    num_bytes = 0  # length of the current line
    for chunk in chunks:
        for number, part in enumerate(chunk.split(b"\n")):
            if number:
                if num_bytes <= max_bytes:
                    yield b"".join(parts)
                parts, num_bytes = [], 0
            if num_bytes > max_bytes:
                continue  # the line is too long
            num_bytes += len(part)
            parts.append(part)
            if num_bytes > max_bytes:
                parts = []
                yield None
    if num_bytes <= max_bytes:
        yield b"".join(parts)
