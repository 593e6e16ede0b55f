"""Lines of JSON, an object a line, from a file of whatever compression or from stdin.

Every record that is malformed is named by file and line. `-` is stdin, and for output stdout.
"""

import bz2
import codecs
import gzip
import json
import lzma
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, BinaryIO, Protocol

import zstandard

from data_pipeline.encodings import as_utf8
from data_pipeline.errors import BadRecordError, SourceMissingError, SourceUnreadableError

STANDARD_STREAM = "-"
COMPRESSIONS = {
    **dict.fromkeys((".gz", ".gzip"), "gz"),
    **dict.fromkeys((".zst", ".zstd"), "zst"),
    ".bz2": "bz2",
    **dict.fromkeys((".xz", ".lzma"), "xz"),
}
"""The method of each suffix of compressed files that are read."""
CORRUPT_ERRORS = (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError, lzma.LZMAError)
"""What reading a compressed file raises that is truncated or none."""

_CHUNK_BYTES = 128 << 10
_MAX_ZSTD_WINDOW_BYTES = 1 << 31  # `zstd --long=31` is the most that the format's tools write


@dataclass(frozen=True)
class Record:
    """An object, and where it stood: `FILE:LINE`, with lines from 1."""

    where: str
    fields: dict[str, Any]


def read_records(path: str) -> "Iterator[Record | BadRecordError]":
    """The records of a file, or of stdin for `-`; of a malformed line, the error.

    Blank lines are passed over; what `COMPRESSIONS` names is decompressed. Raises
    SourceMissingError, SourceUnreadableError.
    """
    if path == STANDARD_STREAM:
        yield from _records(_blocks(sys.stdin.buffer), "stdin")
        return
    if not path:  # Path("") would be the folder we are in
        raise SourceMissingError(
            "(empty): there is no such file; name one of JSON lines, or - for stdin"
        )
    try:
        with Path(path).open("rb") as stream:
            yield from _records(decompressed(stream, PurePath(path).suffix), path)
    except UnicodeDecodeError as error:
        raise SourceUnreadableError(
            f"{path}: not valid {error.encoding.upper()} throughout; convert the file to UTF-8"
        ) from None
    except FileNotFoundError:
        raise SourceMissingError(
            f"{path}: there is no such file; name one of JSON lines, or - for stdin"
        ) from None
    except CORRUPT_ERRORS as error:
        raise corrupt(path, error) from None
    except OSError as error:
        raise SourceUnreadableError(
            f"{path}: {error.strerror or error}; check that the file is there and may be read"
        ) from None


def line_of(fields: dict[str, Any]) -> bytes:
    """One line: ASCII, so that any string can be written, lone surrogates too."""
    return json.dumps(fields).encode() + b"\n"


def parse_record(line: bytes, where: str) -> dict[str, Any]:
    """Raises BadRecordError, which begins with `where`."""
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise not_decodable(where, error) from None
    except (ValueError, RecursionError) as error:  # also numbers too long, brackets too deep
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"{getattr(error, 'msg', error)}{place}"
        raise BadRecordError(
            f"{where}: not valid JSON ({reason}); fix or remove the line, "
            "which must hold one JSON object",
            "not valid JSON",
        ) from None
    return require_object(record, where)


def require_object(value: object, where: str) -> dict[str, Any]:
    """Raises BadRecordError, which begins with `where`."""
    if not isinstance(value, dict):
        raise BadRecordError(
            f"{where}: a JSON {type(value).__name__}, not an object with columns; "
            "a file of records holds one object per line",
            "not a JSON object",
        )
    return value


def decompressed(stream: BinaryIO, suffix: str) -> Iterator[bytes]:
    """A stream's bytes in pieces, decompressed if the suffix is one of `COMPRESSIONS`.

    Raises what the decompressors raise: `CORRUPT_ERRORS`.
    """
    method = COMPRESSIONS.get(suffix.lower())
    if method == "gz":
        with gzip.open(stream, "rb") as inner:
            yield from iter(lambda: inner.read(_CHUNK_BYTES), b"")
        return
    blocks = _blocks(stream)
    if method == "zst":
        yield from _decompress_zst(blocks)
    elif method == "bz2":
        yield from _decompress_streams(blocks, bz2.BZ2Decompressor)
    elif method == "xz":
        yield from _decompress_streams(blocks, lzma.LZMADecompressor)
    else:
        yield from blocks


def lines(chunks: Iterable[bytes]) -> Iterator[tuple[int, bytes]]:
    """Lines that are not blank, with their numbers from 1, without newline or byte order mark.

    Only b"\\n" ends one. Any line may begin with a mark: files with one were joined.
    """
    for number, marked in enumerate(_split(chunks), start=1):
        line = marked.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            yield number, line


def not_decodable(where: str, error: UnicodeDecodeError) -> BadRecordError:
    """The error for bytes that are no text."""
    value = error.object[error.start]
    encoding = error.encoding.upper()
    return BadRecordError(
        f"{where}: byte 0x{value:02X} is not valid {encoding}; convert the file to UTF-8",
        f"not valid {encoding}",
    )


def corrupt(address: str, reason: object) -> SourceUnreadableError:
    """The error for a file that cannot be decompressed to its end."""
    return SourceUnreadableError(
        f"{address}: truncated, or not what its suffix says ({reason}); fetch or write it again"
    )


def _records(chunks: Iterable[bytes], shown: str) -> "Iterator[Record | BadRecordError]":
    for number, line in lines(as_utf8(iter(chunks))):
        where = f"{shown}:{number}"
        try:
            yield Record(where, parse_record(line, where))
        except BadRecordError as error:
            yield error


def _blocks(stream: BinaryIO) -> Iterator[bytes]:
    return iter(lambda: stream.read(_CHUNK_BYTES), b"")


def _decompress_zst(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Every frame of a file. The library's own reader takes a truncated frame for the end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
    frame = None
    for block in blocks:
        rest = block
        while rest:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the last frame is not complete")


class _Decompressor(Protocol):
    """What bz2 and lzma have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def needs_input(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, max_length: int = -1) -> bytes: ...


def _decompress_streams(
    blocks: Iterable[bytes], start: Callable[[], _Decompressor]
) -> Iterator[bytes]:
    """Every stream of a file, with the zeros that may pad it, in pieces of bounded size."""
    decompressor = None
    for block in blocks:
        rest = block
        while rest or (decompressor and not decompressor.needs_input):
            if decompressor is None:
                rest = rest.lstrip(b"\0")
                if not rest:
                    break
                decompressor = start()
            try:
                yield decompressor.decompress(rest, _CHUNK_BYTES)
            except OSError as error:  # of bz2, for data that is not its own
                raise EOFError(str(error)) from None
            rest = decompressor.unused_data if decompressor.eof else b""
            decompressor = None if decompressor.eof else decompressor
    if decompressor:
        raise EOFError("the last stream is not complete")


def _split(chunks: Iterable[bytes]) -> Iterator[bytes]:
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
    yield b"".join(parts)
