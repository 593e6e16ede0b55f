"""The lowest hashes among the documents of a task, by which a val set is given its minimum."""

import heapq

MIN_VAL_DOCUMENTS = 10
KEY_BITS = 53
"""Bits of a hash that are compared: their fraction is exact as a float."""
NOTE_SHIFT = 64 - KEY_BITS


class LowestHashes:
    """Counts the documents of each of the ten lowest hashes."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._highest_first: list[int] = []

    def add(self, eight_bytes: bytes) -> None:
        """Count a document by the first bytes of the hash of its text."""
        key = int.from_bytes(eight_bytes, "big") >> NOTE_SHIFT
        if key in self._counts:
            self._counts[key] += 1
        elif len(self._counts) < MIN_VAL_DOCUMENTS:
            self._counts[key] = 1
            heapq.heappush(self._highest_first, -key)
        elif key < -self._highest_first[0]:
            # What goes cannot come back: the highest hash that is kept only gets lower.
            del self._counts[-heapq.heapreplace(self._highest_first, -key)]
            self._counts[key] = 1

    def counted(self) -> tuple[tuple[int, int], ...]:
        """Hashes and the numbers of their documents, the lowest first."""
        return tuple(sorted(self._counts.items()))
