"""What ranks tell each other, as JSON of a declared type: nothing that arrives is ever executed.

A value comes back as what it was: dataclasses, tuples, paths, NaN and infinity too. What is not of
the declared type is refused.
"""

import json
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from data_pipeline.errors import LaunchError


def encode(value: object, kind: Any) -> bytes:
    """A value of a type (`int`, `Facts | None`, `list[Path]`, ...) as JSON."""
    plain = _adapter(kind).dump_python(value, mode="json")
    # Lone surrogates (a file's name in a message) are no JSON.
    return json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace")


def decode(message: bytes, kind: Any, sender: int) -> Any:
    """The value that rank `sender` has encoded. Raises LaunchError."""
    try:
        return _adapter(kind).validate_json(message, strict=True)
    except ValueError:
        raise LaunchError(
            f"rank {sender} has sent what this version of megaback does not understand; install "
            "the same version on all nodes, and see that nobody else reaches the ranks' ports"
        ) from None


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
