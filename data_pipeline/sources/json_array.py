"""Streaming parser of JSON arrays and of objects over several lines.

Memory is bounded by a few times the longest element.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.record_limits import (
    DEFAULT_MAX_RECORD_BYTES,
    holds_too_many_values,
    max_values,
)

_BLANKS = re.compile(r"[ \t\r\n]*")
_MIN_READ_CHARACTERS = 1 << 16
# The error of a truncated element may be this far before the end of the buffer.
_LONGEST_TOKEN_CHARACTERS = 32


def read_array(
    chunks: Iterator[bytes], shown: str, max_characters: int = DEFAULT_MAX_RECORD_BYTES
) -> Iterator[tuple[int, Any]]:
    """Numbered elements of an array, from 1. Raises SourceUnreadableError, UnicodeDecodeError.

    Malformed and too long elements cannot be skipped, since the start of the next one is unknown.
    """
    text = _Text(chunks, max_characters)
    text.require("[", shown, 0)
    number = 0
    if text.next_is("]"):
        text.take()
    else:
        while True:
            number += 1
            yield number, text.element(shown, number)
            if text.next_is("]"):
                text.take()
                break
            text.require(",", shown, number)
    if text.peek():
        raise _malformed(shown, number, "text after the end of the array")


def read_values(
    chunks: Iterator[bytes], shown: str, max_characters: int = DEFAULT_MAX_RECORD_BYTES
) -> Iterator[tuple[int, Any]]:
    """Numbered consecutive values, from 1. Raises as `read_array`."""
    text = _Text(chunks, max_characters)
    number = 0
    while text.peek():
        number += 1
        yield number, text.element(shown, number)


class _Text:
    """Buffered text of a file."""

    def __init__(self, chunks: Iterator[bytes], max_characters: int) -> None:
        self._chunks = chunks
        self._max_characters = max_characters
        self._max_values = max_values(max_characters)
        self._put_back = ""
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._buffer = ""
        self._start = 0
        self._is_whole = False

    def peek(self) -> str:
        """The next non-blank character; empty at the end."""
        while True:
            self._start = _BLANKS.match(self._buffer, self._start).end()  # type: ignore[union-attr]
            if self._start < len(self._buffer):
                return self._buffer[self._start]
            if not self._read(1):
                return ""

    def next_is(self, character: str) -> bool:
        return self.peek() == character

    def take(self) -> None:
        self._start += 1

    def require(self, character: str, shown: str, number: int) -> None:
        """Consume a character. Raises SourceUnreadableError if the next one is another."""
        found = self.peek()
        if found != character:
            what = f"expected {character!r}, found {found!r}" if found else "truncated file"
            raise _malformed(shown, number, what)
        self.take()

    def element(self, shown: str, number: int) -> Any:
        """Consume one value. Raises SourceUnreadableError."""
        self.peek()
        self._limit_held(self._max_values)  # N characters have at most N values
        while True:
            try:
                value, stop = self._json.raw_decode(self._buffer, self._start)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or (
                    error.pos >= len(self._buffer) - _LONGEST_TOKEN_CHARACTERS
                )
                if is_cut:
                    self._require_short(len(self._buffer), shown, number)
                # Double the buffer, so that a long element is parsed only a few times.
                minimum = min(len(self._buffer) - self._start, self._max_values)
                if not is_cut or not self._read(minimum):
                    raise _malformed(shown, number, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise _malformed(shown, number, str(error)) from None
            else:
                # A number may continue beyond the buffer.
                if stop < len(self._buffer) or not self._read(1):
                    self._require_short(stop, shown, number)
                    self._start = stop
                    return value

    def _require_short(self, stop: int, shown: str, number: int) -> None:
        """Raises SourceUnreadableError if an element, up to `stop`, exceeds the limits."""
        maximum = self._max_characters
        if stop - self._start <= self._max_values:
            return
        is_long = stop - self._start > maximum
        if is_long or holds_too_many_values(self._buffer[self._start : stop], maximum):
            what = "is longer" if is_long else "has more values"
            raise SourceUnreadableError(
                f"{shown}: element {number} {what} than `max_record_bytes` {maximum} allows; raise "
                "the limit if there is memory for 20 times as much, or write one object per line, "
                "so that long ones can be skipped"
            )

    def _limit_held(self, num_characters: int) -> None:
        """Move text beyond `num_characters` out of the buffer."""
        stop = self._start + num_characters
        if stop < len(self._buffer):
            self._put_back = self._buffer[stop:] + self._put_back
            self._buffer, self._start = self._buffer[self._start : stop], 0

    def _read(self, minimum: int) -> bool:
        """Buffer at least `minimum` more characters if possible; False at the end."""
        parts = [self._buffer[self._start :], self._put_back]
        self._start, self._put_back = 0, ""
        wanted = max(minimum, _MIN_READ_CHARACTERS) - len(parts[1])
        while wanted > 0 and not self._is_whole:
            chunk = next(self._chunks, None)
            self._is_whole = chunk is None
            parts.append(self._decoder.decode(chunk or b"", final=self._is_whole))
            wanted -= len(parts[-1])
        self._buffer = "".join(parts)
        return len(self._buffer) > len(parts[0])


def _malformed(shown: str, number: int, reason: str) -> SourceUnreadableError:
    return SourceUnreadableError(
        f"{shown}: not valid JSON (at element {number}: {reason}); fix the file, or write one "
        "object per line"
    )
