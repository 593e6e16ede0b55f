"""The lowest hashes of a task's documents, from which a small val set is filled up."""

import heapq

MIN_VAL_DOCUMENTS = 10
KEY_BITS = 53
"""Bits of a hash that are compared: their fraction is exact as a float."""
NOTE_SHIFT = 64 - KEY_BITS


class LowestHashes:
    """Counts the documents of each of the MIN_VAL_DOCUMENTS lowest hashes."""

    def __init__(self) -> None:
        self._counts: dict[int, int] = {}
        self._highest_first: list[int] = []

    def add(self, eight_bytes: bytes) -> None:
        """Count a document by the first eight bytes of the hash of its text."""
        key = int.from_bytes(eight_bytes, "big") >> NOTE_SHIFT
        if key in self._counts:
            self._counts[key] += 1
        elif len(self._counts) < MIN_VAL_DOCUMENTS:
            self._counts[key] = 1
            heapq.heappush(self._highest_first, -key)
        elif key < -self._highest_first[0]:
            # A dropped hash cannot return: the highest kept hash only decreases.
            del self._counts[-heapq.heapreplace(self._highest_first, -key)]
            self._counts[key] = 1

    def counted(self) -> tuple[tuple[int, int], ...]:
        """Hashes, each with its number of documents, lowest first."""
        return tuple(sorted(self._counts.items()))
