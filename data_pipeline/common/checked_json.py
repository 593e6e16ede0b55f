"""Parsing of untrusted JSON, with bounded memory and checked types.

Memory is bounded before a text is parsed. A dataclass is made from a JSON object only if every
value has the type that the class declares.
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
"""Size of a dict with one key; a list takes less."""
_VALUE_BYTES = 90
"""Size of a short string in a list; a number takes less."""
_MAX_SHOWN_CHARACTERS = 100
_BRIEFLY = reprlib.Repr()
_BRIEFLY.maxlevel = 1


def read_json(path: Path, max_bytes: int = MAX_RECORD_BYTES) -> Any:
    """The value of a JSON file. Raises OSError, and ValueError if it is invalid or too large."""
    try:
        data = read_file(path, max_bytes)
    except OSError as error:
        if error.errno in UNFIT:
            raise ValueError(error.strerror) from None
        raise
    return parse_json(data)


def parse_json(data: bytes) -> Any:
    """The value of a JSON text. Raises ValueError if it is invalid or too large."""
    containers = data.count(b"{") + data.count(b"[")
    parsed_bytes = containers * _CONTAINER_BYTES + data.count(b",") * _VALUE_BYTES
    if parsed_bytes > max(_MAX_PARSED_BYTES, _MAX_EXPANSION * len(data)):
        raise ValueError(f"its {containers:,} objects and lists exceed the memory limit of parsing")
    return finite_json(data.decode())


def made_from(kind: type[_Made], value: object) -> _Made:
    """A dataclass from a JSON object, with lists as tuples.

    Raises ValueError or TypeError unless the fields and their types are those of the class.
    """
    if not isinstance(value, dict):
        raise ValueError(f"{briefly(value)} is not an object")
    hints = _hints(kind)
    fields = {}
    for name, one in value.items():
        if name not in hints:
            raise ValueError(f"unknown key {briefly(name)}")
        hint = hints[name]
        fields[name] = one if type(one) is hint else checked(name, one, hint)
    return kind(**fields)


def checked(name: str, value: Any, hint: Any) -> Any:
    """A JSON value, with lists as tuples where the type hint has tuples.

    Raises ValueError, with `name`, unless the value has the type.
    """
    try:
        return _converted(value, hint)
    except TypeError:
        raise ValueError(f"{name} is {briefly(value)}, which has the wrong type") from None


def require_within(name: str, value: int, minimum: int, maximum: int) -> None:
    """Raises ValueError unless `minimum` <= `value` <= `maximum`."""
    if not minimum <= value <= maximum:
        raise ValueError(
            f"{name} is {briefly(value)}, which is not in the range {minimum}..{maximum}"
        )


def require_sha256(name: str, value: str) -> None:
    """Raises ValueError unless a text is a SHA-256 as 64 lowercase hexadecimal digits."""
    if _SHA256.fullmatch(value) is None:
        raise ValueError(f"{name} is {briefly(value)}, which is not a SHA-256")


def briefly(value: object) -> str:
    """Abbreviated repr of a value."""
    return _BRIEFLY.repr(value)[:_MAX_SHOWN_CHARACTERS]


# Cached: files have thousands of objects of one class.
_hints: Callable[[Any], dict[str, Any]] = lru_cache(maxsize=32)(typing.get_type_hints)


def _converted(value: Any, hint: Any) -> Any:
    """Raises TypeError, and ValueError for nested values."""
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
    # In Python, True is an int; in JSON, a float may be written as an integer.
    is_whole_float = hint is float and type(value) is int and abs(value) < 1 << 53
    if type(value) is not hint and not is_whole_float:
        raise TypeError
    return value
