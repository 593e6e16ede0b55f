"""Text that a model is writing, in parts: each is given out once it can no longer change.

A backward model writes from right to left, so that a part stands before all that were given out,
and a character's last byte may be there before its first. No part ever holds a piece of a
character. All parts together are the whole: for a backward model `"".join(reversed(parts))`, else
`"".join(parts)`. What is no character becomes U+FFFD, lone surrogates too, so that every part can
be sent as UTF-8.
"""

import codecs
from collections.abc import Sequence

from data_pipeline.text.codec import Direction, TextCodec, reverse_words

# After a byte that begins a character, at most three go on with it.
_MAX_CONTINUATION_BYTES = 3


def sendable(text: str) -> str:
    """A text with U+FFFD for each lone surrogate, which UTF-8 cannot hold.

    >>> sendable("a\\ud800")
    'a\ufffd'
    """
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


class IncrementalDetokenizer:
    """What a model writes next to a given text, without that text."""

    def __init__(self, codec: TextCodec, held_back: bytes = b"") -> None:
        """`held_back`: bytes of the given text that the first id brings back: see `Prompt`."""
        self._codec = codec
        self.grows_leftwards = codec.format.direction is Direction.BACKWARD
        self._held_back = held_back
        self._pending = b""
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last_run: list[str] = []

    def add(self, new_id: int) -> str:
        """The text that has become certain with one more id; may be empty."""
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
        """The rest, when no id follows."""
        if self._codec.reverses_ids:
            return self._take(0)
        text = self._decoder.decode(b"", final=True)
        if not self._codec.reverses_words:
            return text
        rest = "".join([*self._last_run, text])
        self._last_run = []
        return reverse_words(rest)

    def _take(self, undecided: int) -> str:
        """Decode what is pending but for so many bytes."""
        decided, self._pending = self._pending[undecided:], self._pending[:undecided]
        return decided.decode("utf-8", "replace")

    def _whole_runs(self, text: str) -> str:
        """Words, and the whitespace between them, of which the last one may yet go on."""
        if not text:
            return ""
        start = _last_run_start(text)
        run = self._last_run
        if start == 0 and (not run or run[-1][-1].isspace() == text[0].isspace()):
            run.append(text)  # a giant word is joined once, not with each of its parts
            return ""
        self._last_run = [text[start:]]
        return reverse_words("".join([*run, text[:start]]))


def _last_run_start(text: str) -> int:
    """Where the last word begins, or the whitespace after it: as `reverse_words` parts a text.

    >>> _last_run_start("a  cat"), _last_run_start("cat  ")
    (3, 3)
    """
    if text[-1].isspace():
        return len(text.rstrip())
    return len(text) - len(text.rsplit(None, 1)[-1])


def _undecided(raw: bytes) -> int:
    """How many bytes at the left may belong to a character that begins further left.

    A byte that is no continuation begins anew for every decoder, whatever is before it; so from
    there on nothing changes. Of more continuations than a character has, only the first can belong
    to one.
    """
    count = 0
    while count < len(raw) and count < _MAX_CONTINUATION_BYTES and 0x80 <= raw[count] < 0xC0:
        count += 1
    return count


class StopTexts:
    """Finds the first of some texts in what is being written, and holds back what may be its part.

    The first is the one that was complete first: the nearest to the given text.
    """

    def __init__(self, stops: Sequence[str], *, grows_leftwards: bool) -> None:
        self._grows_leftwards = grows_leftwards
        # As they are written; of several that end at one place the longest cuts the most.
        self._stops = sorted(map(self._turn, stops), key=len, reverse=True)
        self._pending = ""
        self.is_found = False

    def add(self, part: str) -> str:
        """What can be given out of one more part."""
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
        """From the order of reading to that of writing, or back."""
        return text[::-1] if self._grows_leftwards else text

    def finish(self) -> str:
        """What was held back, when nothing follows."""
        rest, self._pending = self._turn(self._pending), ""
        return rest


def _overlap(written: str, stop: str) -> int:
    """The most characters at the end of one that begin the other."""
    maximum = min(len(written), len(stop) - 1)
    return next((n for n in range(maximum, 0, -1) if written.endswith(stop[:n])), 0)
