"""Incremental detokenization: text is emitted in parts, each once it can no longer change.

A backward model writes from right to left, so that each part precedes the earlier ones, and a
character's last byte may arrive before its first. A part never contains a piece of a character. The
whole is `"".join(reversed(parts))` for a backward model, else `"".join(parts)`. Invalid bytes and
lone surrogates become U+FFFD, so that every part can be sent as UTF-8.
"""

import codecs
from collections.abc import Sequence

from data_pipeline.text.codec import Direction, TextCodec, reverse_words

# UTF-8 characters have at most three bytes after the first.
_MAX_CONTINUATION_BYTES = 3


def sendable(text: str) -> str:
    """Replace each lone surrogate, which UTF-8 cannot encode, with U+FFFD.

    >>> sendable("a\\ud800")
    'a\ufffd'
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class IncrementalDetokenizer:
    """Detokenizes a continuation of a given text, without that text."""

    def __init__(self, codec: TextCodec, held_back: bytes = b"") -> None:
        """`held_back`: bytes of the given text that the first id contains: see `Prompt`."""
        self._codec = codec
        self.grows_leftwards = codec.format.direction is Direction.BACKWARD
        self._held_back = held_back
        self._pending = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last_run: list[str] = []

    def add(self, new_id: int) -> str:
        """Text that one more id completes; may be empty."""
        raw = self._codec.piece_bytes(new_id)
        if self._codec.reverses_ids:
            if self._held_back:
                raw, self._held_back = raw[: len(raw) - len(self._held_back)], b""
            self._pending = raw + self._pending
            return self._take(_undecided(self._pending))
        if self._held_back:
            raw, self._held_back = raw[len(self._held_back) :], b""
        text = self._decoder.decode(raw)
        return self._whole_runs(text) if self._codec.reverses_words else text

    def finish(self) -> str:
        """The remaining text, after the last id."""
        if self._codec.reverses_ids:
            return self._take(0)
        text = self._decoder.decode(b"", final=True)
        if not self._codec.reverses_words:
            return text
        rest = "".join([*self._last_run, text])
        self._last_run = []
        return reverse_words(rest)

    def _take(self, undecided: int) -> str:
        """Decode the pending bytes except the `undecided` leftmost ones."""
        decided, self._pending = self._pending[undecided:], self._pending[:undecided]
        return decided.decode("utf-8", "replace")

    def _whole_runs(self, text: str) -> str:
        """Complete runs of words and whitespace; the last run may still grow."""
        if not text:
            return ""
        start = _last_run_start(text)
        run = self._last_run
        if start == 0 and (not run or run[-1][-1].isspace() == text[0].isspace()):
            run.append(text)  # joined once: joining at each part would be quadratic
            return ""
        self._last_run = [text[start:]]
        return reverse_words("".join([*run, text[:start]]))


def _last_run_start(text: str) -> int:
    """Start of the last run of word characters or whitespace, as `reverse_words` splits a text.

    >>> _last_run_start("a  cat"), _last_run_start("cat  ")
    (3, 3)
    """
    if text[-1].isspace():
        return len(text.rstrip())
    return len(text) - len(text.rsplit(None, 1)[-1])


def _undecided(raw: bytes) -> int:
    """Number of leading bytes that may belong to a character that begins further left.

    Decoding restarts at any byte that is not a continuation byte, whatever precedes it. Of a longer
    run of continuation bytes, only the first three can belong to a character.
    """
    count = 0
    while count < len(raw) and count < _MAX_CONTINUATION_BYTES and 0x80 <= raw[count] < 0xC0:
        count += 1
    return count


class StopTexts:
    """Finds the first stop text in streamed parts, and holds back a possible beginning of one.

    The first is the one completed first: the nearest to the given text.
    """

    def __init__(self, stops: Sequence[str], *, grows_leftwards: bool) -> None:
        self._grows_leftwards = grows_leftwards
        # In writing order. Of several that end at one place, the longest applies.
        self._stops = sorted(map(self._turn, stops), key=len, reverse=True)
        self._pending = ""
        self.is_found = False

    def add(self, part: str) -> str:
        """Text that can be emitted after one more part."""
        if self.is_found or not self._stops:
            return "" if self.is_found else part
        written = self._pending + self._turn(part)
        ends = [(at + len(stop), at) for stop in self._stops if (at := written.find(stop)) >= 0]
        if ends:
            self.is_found = True
            _, cut = min(ends)
            self._pending = ""
            return self._turn(written[:cut])
        held = max(_overlap(written, stop) for stop in self._stops)
        self._pending = written[len(written) - held :]
        return self._turn(written[: len(written) - held])

    def _turn(self, text: str) -> str:
        """Convert between reading order and writing order."""
        return text[::-1] if self._grows_leftwards else text

    def finish(self) -> str:
        """The text held back, after the last part."""
        rest, self._pending = self._turn(self._pending), ""
        return rest


def _overlap(written: str, stop: str) -> int:
    """Length of the longest end of `written` that begins `stop`, without being all of it."""
    maximum = min(len(written), len(stop) - 1)
    return next((n for n in range(maximum, 0, -1) if written.endswith(stop[:n])), 0)
