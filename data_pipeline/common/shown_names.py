"""Abbreviated lists of names in messages: an untrusted file may have a million columns."""

from collections.abc import Iterable
from itertools import islice

_MAX_NAMES = 20
_MAX_CHARACTERS = 60


def shown_names(names: Iterable[object]) -> str:
    """Comma-separated names, abbreviated if many or long; `none` if empty.

    >>> shown_names(["text", "x" * 100, *range(30)])[-24:]
    '15, 16, 17 and 12 others'
    """
    remaining = iter(names)
    shown = [_cut(str(name)) for name in islice(remaining, _MAX_NAMES)]
    num_others = sum(1 for _ in remaining)
    others = "others" if num_others > 1 else "other"
    return (", ".join(shown) or "none") + (f" and {num_others:,} {others}" if num_others else "")


def _cut(name: str) -> str:
    return name if len(name) <= _MAX_CHARACTERS else f"{name[:_MAX_CHARACTERS]}..."
