"""Differences between two nested mappings, for messages."""

from collections.abc import Iterable, Mapping
from typing import Any

Differences = dict[str, tuple[Any, Any]]
"""Both values by key; None for a missing key."""


def differing_keys(
    one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str] | None = None
) -> Differences:
    """Keys whose values differ: of all keys, or of `keys` and those nested in them."""
    found: Differences = {}
    for key in dict.fromkeys([*one, *other]) if keys is None else keys:
        found |= _below(key, _look_up(one, key), _look_up(other, key))
    return found


def shown_values(differing: Differences, side: int) -> str:
    """One side's values, by key."""
    return ", ".join(f"{key} = {_shown(both[side])}" for key, both in differing.items())


def _below(key: str, one: Any, other: Any) -> Differences:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        pairs = {f"{key}.{part}": (one.get(part), other.get(part)) for part in (*one, *other)}
    elif isinstance(one, list | tuple) and isinstance(other, list | tuple):
        if len(one) != len(other):
            if all(isinstance(x, str) for x in (*one, *other)):
                return {key: (one, other)}
            # Elements of only one of them.
            both = ([x for x in one if x not in other], [x for x in other if x not in one])
            return {key: both}
        pairs = {f"{key}[{place}]": both for place, both in enumerate(zip(one, other, strict=True))}
    else:
        return {} if one == other else {key: (one, other)}
    found: Differences = {}
    for below, (mine, theirs) in pairs.items():
        found |= _below(below, mine, theirs)
    return found


def _look_up(fields: Mapping[str, Any], key: str) -> Any:
    value: Any = fields
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(_shown, value)) or "none"
    return "null" if value is None else str(value)
