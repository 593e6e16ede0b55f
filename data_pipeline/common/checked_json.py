"""JSON files that may be a stranger's: of bounded size, and with values of the expected types.

What a text would take in memory is bounded before it is parsed. A dataclass is made from a JSON
object only if every value has the type that the class declares.
"""

import dataclasses
import re
import reprlib
import types
import typing
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from data_pipeline.common.limits import MAX_RECORD_BYTES
from data_pipeline.common.number_ranges import finite_json
from data_pipeline.common.regular_files import UNFIT, read_file

_Made = TypeVar("_Made")

_SHA256 = re.compile(r"[0-9a-f]{64}")
_MAX_PARSED_BYTES = 512 << 20
_MAX_EXPANSION = 12
"""Memory per byte of a large file: a plan's lists of three numbers take eleven times their
bytes."""
_CONTAINER_BYTES = 240
"""A dict of one key; a list takes less."""
_VALUE_BYTES = 90
"""A short string with its place in a list; a number takes less."""
_MAX_SHOWN_CHARACTERS = 100
_BRIEFLY = reprlib.Repr()
_BRIEFLY.maxlevel = 1


def read_json(path: Path, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """The value in a JSON file. Raises OSError, and ValueError saying what is wrong with it."""
    try:
        data = read_file(path, max_bytes)
    except OSError as error:
        if error.errno in UNFIT:
            raise ValueError(error.strerror) from None
        raise
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """The value that a JSON text spells. Raises ValueError when it is not one, or too large."""
    containers = data.count(b"{") + data.count(b"[")
    parsed_bytes = containers * _CONTAINER_BYTES + data.count(b",") * _VALUE_BYTES
    if parsed_bytes > max(_MAX_PARSED_BYTES, _MAX_EXPANSION * len(data)):
        raise ValueError(f"it holds {containers:,} objects and lists, too many to be read")
    return finite_json(data.decode())


def made_from(kind: type[_Made], value: object) -> _Made:
    """A dataclass of the values in a JSON object, lists as tuples.

    Raises ValueError or TypeError unless it has the fields of the class, each of its type.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{briefly(value)} is not an object")
    hints = _hints(kind)
    fields = {}
    for name, one in value.items():
        if name not in hints:
            raise ValueError(f"{briefly(name)} is not a key of it")
        hint = hints[name]
        fields[name] = one if type(one) is hint else checked(name, one, hint)
    return kind(**fields)


def checked(name: str, value: Any, hint: Any) -> Any:
    """A value of a JSON file, a list as a tuple where the type hint says so.

    Raises ValueError, naming it, unless it has the type.
    """
    try:
        return _converted(value, hint)
    except TypeError:
        raise ValueError(f"{name} is {briefly(value)}") from None


def require_within(name: str, value: int, minimum: int, maximum: int) -> None:
    """Raises ValueError unless a number lies in a range, both ends of which belong to it."""
    if not minimum <= value <= maximum:
        raise ValueError(
            f"{name} is {briefly(value)}, which is not in the range {minimum}..{maximum}"
        )


def require_sha256(name: str, value: str) -> None:
    """Raises ValueError unless a text is a SHA-256 as 64 lowercase hexadecimal digits."""
    if _SHA256.fullmatch(value) is None:
        raise ValueError(f"{name} is {briefly(value)}, which is not a SHA-256")


def briefly(value: object) -> str:
    """A value of any size, in a few characters."""
    return _BRIEFLY.repr(value)[:_MAX_SHOWN_CHARACTERS]


# Thousands of objects are of one class.
_hints: Callable[[Any], dict[str, Any]] = lru_cache(maxsize=32)(typing.get_type_hints)


def _converted(value: Any, hint: Any) -> Any:
    """Raises TypeError, and ValueError for what a value holds."""
    if type(value) is hint:  # most values, of which a plan may have a million
        return value
    origin, parts = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and types.NoneType in parts:
            return None
        (hint,) = (part for part in parts if part is not types.NoneType)
        return _converted(value, hint)
    if origin is tuple and isinstance(value, list | tuple):
        if parts[-1] is not ... and len(parts) != len(value):
            raise TypeError
        each = parts[:1] * len(value) if parts[-1] is ... else parts
        return tuple(map(_converted, value, each))
    if origin is dict and isinstance(value, dict):
        return {_converted(key, parts[0]): _converted(one, parts[1]) for key, one in value.items()}
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return made_from(hint, value)
    # In Python, True is an int, and in JSON a whole number may stand for a real one.
    is_whole_float = hint is float and type(value) is int and abs(value) < 1 << 53
    if type(value) is not hint and not is_whole_float:
        raise TypeError
    return value
