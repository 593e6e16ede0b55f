"""Text that a model writes after a prompt, in reading order: while it grows, and up to a stop text.

A backward model writes from right to left: each part of its text precedes the earlier ones, and a
character's last byte may arrive before its first.
"""

import codecs
import re
from collections.abc import Sequence
from dataclasses import dataclass

_RUNS = re.compile(r"\s+|\S+")
# UTF-8 characters have at most three bytes after the first.
_MAX_CONTINUATION_BYTES = 3


def reverse_words(text: str) -> str:
    """Reverse the sequence of words and of the whitespace between them: its own inverse."""
    return "".join(reversed(_RUNS.findall(text)))


def stop_texts(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Stop texts as a tuple. Raises TypeError for anything but non-empty strings."""
    if stop is None:
        return ()
    stops = tuple(stop) if isinstance(stop, list | tuple) else (stop,)
    if not all(isinstance(one, str) and one for one in stops):
        raise TypeError("`stop` takes a non-empty string or a list of them")
    return stops


@dataclass(frozen=True)
class NewText:
    """Text of new ids, without the given text, ended by the stop text nearest to the given one."""

    texts: Sequence[bytes]
    """UTF-8 text of each id of the vocabulary."""
    direction: str
    unit: str
    held_back: bytes = b""
    """Bytes of the given text that the first new id contains."""
    stops: tuple[str, ...] = ()

    @property
    def grows_leftwards(self) -> bool:
        return self.direction == "backward"

    def read(self, ids: Sequence[int], *, is_whole: bool = True) -> tuple[str, bool]:
        """Text of the new ids, and whether a stop text, which it excludes, ended it.

        Unless the ids are all, only what later ones cannot change: no piece of a character or, with
        unit `word`, of a word, and no possible beginning of a stop text. Bytes that are not UTF-8
        become U+FFFD.
        """
        text = self._turned(self._settled(ids, is_whole))
        stops = [self._turned(stop) for stop in self.stops]
        # Of several that end at one place, the longest applies.
        ends = [(at + len(stop), at) for stop in stops if (at := text.find(stop)) >= 0]
        if ends:
            return self._turned(text[: min(ends)[1]]), True
        if not is_whole:
            held = max((_overlap(text, stop) for stop in stops), default=0)
            text = text[: len(text) - held]
        return self._turned(text), False

    def joined(self, new: str, given: str) -> str:
        """The whole text in reading order."""
        return new + given if self.grows_leftwards else given + new

    def _turned(self, text: str) -> str:
        """Convert between reading order and writing order."""
        return text[::-1] if self.grows_leftwards else text

    def _settled(self, ids: Sequence[int], is_whole: bool) -> str:
        raws = [self.texts[i] for i in ids]
        if self.grows_leftwards and self.unit == "token":
            raw = b"".join(reversed(raws))
            raw = raw[: max(len(raw) - len(self.held_back), 0)]
            start = 0
            # They may belong to a character that begins further left.
            while not is_whole and start < min(len(raw), _MAX_CONTINUATION_BYTES):
                if not 0x80 <= raw[start] < 0xC0:
                    break
                start += 1
            return raw[start:].decode("utf-8", "replace")
        decoder = codecs.getincrementaldecoder("utf-8")("replace")
        text = decoder.decode(b"".join(raws)[len(self.held_back) :], final=is_whole)
        if not self.grows_leftwards:
            return text
        runs = _RUNS.findall(text)
        return "".join(reversed(runs if is_whole else runs[:-1]))


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of a text that begins a stop text, without being all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((n for n in range(longest, 0, -1) if text.endswith(stop[:n])), 0)
