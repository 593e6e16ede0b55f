"""In which keys two configs differ, and how a message shows just these."""

from collections.abc import Iterable, Mapping
from typing import Any

Differences = Mapping[str, tuple[Any, Any]]
"""By key, both values; None for a key that is not there."""


def differing_keys(
    one: Mapping[str, Any], other: Mapping[str, Any], keys: Iterable[str]
) -> Differences:
    """The keys with another value here than there, among some keys and what is below these."""
    found: dict[str, tuple[Any, Any]] = {}
    for key in keys:
        found |= _below(key, _look_up(one, key), _look_up(other, key))
    return found


def shown_values(differing: Differences, side: int) -> str:
    """One side's values, by key."""
    return ", ".join(f"{key} = {_shown(both[side])}" for key, both in differing.items())


def _below(key: str, one: Any, other: Any) -> dict[str, tuple[Any, Any]]:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        found: dict[str, tuple[Any, Any]] = {}
        for part in dict.fromkeys([*one, *other]):
            found |= _below(f"{key}.{part}", one.get(part), other.get(part))
        return found
    return {} if one == other else {key: (one, other)}


def _look_up(fields: Mapping[str, Any], key: str) -> Any:
    value: Any = fields
    for part in key.split("."):
        value = value.get(part) if isinstance(value, Mapping) else None
    return value


def _shown(value: Any) -> str:
    return "null" if value is None else str(value)
