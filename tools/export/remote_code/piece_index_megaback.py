"""Index of a vocabulary by the beginnings or the ends of its texts.

A prompt asks which pieces contain its last one; a scan of a large vocabulary would take longer than
encoding the text.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Sequence


class PieceIndex:
    """Ids whose text begins with given bytes, or ends with them (`by_end`)."""

    def __init__(self, texts: Sequence[bytes], *, by_end: bool) -> None:
        """`texts`: of each id; those without one are not in the index."""
        self._step = -1 if by_end else 1
        self.ids = [i for i, text in enumerate(texts) if text]
        self.ids_without_text = [i for i, text in enumerate(texts) if not text]
        self._ordered_ids = sorted(self.ids, key=lambda i: texts[i][:: self._step])
        self._keys = [texts[i][:: self._step] for i in self._ordered_ids]

    def containing(self, part: bytes) -> list[int]:
        """Ids of the texts that have a part at the given side, ascending."""
        key, size = part[:: self._step], len(part)
        first = bisect_left(self._keys, key)
        last = bisect_right(self._keys, key, first, key=lambda text: text[:size])
        return sorted(self._ordered_ids[first:last])
