"""Messages between ranks, as JSON of a declared type, so that received data is never executed.

Values round-trip, including dataclasses, tuples, paths, NaN and infinity. A message that is not of
the declared type is an error.
"""

import json
from functools import lru_cache
from typing import Any

from pydantic import TypeAdapter

from data_pipeline.errors import LaunchError


def encode(value: object, kind: Any) -> bytes:
    """A value of a type (`int`, `Facts | None`, `list[Path]`, ...) as JSON."""
    plain = _adapter(kind).dump_python(value, mode="json")
    # JSON cannot contain lone surrogates (from a file name in a message).
    return json.dumps(plain, ensure_ascii=False).encode("utf-8", "replace")


def decode(message: bytes, kind: Any, sender: int) -> Any:
    """The value that rank `sender` encoded. Raises LaunchError."""
    try:
        return _adapter(kind).validate_json(message, strict=True)
    except ValueError:
        raise LaunchError(
            f"rank {sender} sent a message that this version of megaback cannot decode; install "
            "the same version on all nodes, and make sure that only ranks can reach their ports"
        ) from None


@lru_cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    return TypeAdapter(kind)
