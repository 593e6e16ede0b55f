"""JSON values that are not a line each: elements of an array, or objects over several lines.

Memory is bounded by a few times the longest element, not by the file.
"""

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import SourceUnreadableError

_BLANKS = re.compile(r"[ \t\r\n]*")
_MIN_READ_CHARACTERS = 1 << 16
# An element that is cut may be reported a little before the end of what was read.
_LONGEST_TOKEN_CHARACTERS = 32


def read_array(chunks: Iterator[bytes], shown: str) -> Iterator[tuple[int, Any]]:
    """The elements with their numbers, from 1. Raises SourceUnreadableError, UnicodeDecodeError.

    What is malformed in an array hides where its next element begins, so that it cannot be left
    out.
    """
    text = _Text(chunks)
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
        raise _malformed(shown, number, "something follows the array")


def read_values(chunks: Iterator[bytes], shown: str) -> Iterator[tuple[int, Any]]:
    """Values one after another, with their numbers, from 1. Raises as `read_array`."""
    text = _Text(chunks)
    number = 0
    while text.peek():
        number += 1
        yield number, text.element(shown, number)


class _Text:
    """The text of a file, of which what was read and not yet taken is held."""

    def __init__(self, chunks: Iterator[bytes]) -> None:
        self._chunks = chunks
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._buffer = ""
        self._start = 0
        self._is_whole = False

    def peek(self) -> str:
        """The next character that is not blank; empty at the end."""
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
        """Take a character. Raises SourceUnreadableError if the next one is another."""
        found = self.peek()
        if found != character:
            what = f"{found!r} stands where {character!r} must" if found else "the file is cut"
            raise _malformed(shown, number, what)
        self.take()

    def element(self, shown: str, number: int) -> Any:
        """Take one value. Raises SourceUnreadableError."""
        self.peek()
        while True:
            try:
                value, stop = self._json.raw_decode(self._buffer, self._start)
            except json.JSONDecodeError as error:
                is_cut = error.msg.startswith("Unterminated string") or (
                    error.pos >= len(self._buffer) - _LONGEST_TOKEN_CHARACTERS
                )
                # Read as much again as there is: a long element is parsed a few times only.
                if not is_cut or not self._read(len(self._buffer) - self._start):
                    raise _malformed(shown, number, error.msg) from None
            except (ValueError, RecursionError) as error:
                raise _malformed(shown, number, str(error)) from None
            else:
                # A number may go on in what was not read yet.
                if stop < len(self._buffer) or not self._read(1):
                    self._start = stop
                    return value

    def _read(self, least: int) -> bool:
        """Hold at least `least` more characters, if there are; False if there are none."""
        parts = [self._buffer[self._start :]]
        self._start = 0
        wanted = max(least, _MIN_READ_CHARACTERS)
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
