"""Mutations of an input: any bytes, and values within JSON, YAML and packed headers."""

import json
import random
from collections.abc import Callable, Sequence
from typing import Any

_NUMBERS = (
    *(0, 1, -1, 2, 7, 255, 256, 65535, 1 << 24, (1 << 31) - 1, 1 << 31, 1 << 32, (1 << 53) + 1),
    *(1 << 63, (1 << 64) - 1, -(1 << 63), 10**30, 0.5, -0.0, 1e308, 5e-324),
)
_TEXTS = (
    *("", ".", "..", "/", "../../x", "/etc/passwd", "a/b", "\0", "\n", "\x1b[2J", "\u202e"),
    *("\ud800", "x" * 300, "9" * 5000, "NaN", "null", "-", "file:///etc/passwd", "http://[::1]/"),
)  # fmt: skip
_VALUES: tuple[Any, ...] = (
    *(None, True, False, [], {}, [[]], {"": {}}, float("nan"), float("inf")),
    *_NUMBERS,
    *_TEXTS,
)
_RAW = (b"\0", b"\xff", b"\xff" * 8, b"\x80\0\0\0", b"{", b"[" * 2000, b'"', b"\r\n", b"\n" * 50)


def mutate_bytes(data: bytes, generator: random.Random) -> bytes:
    """Bytes with one to four changes anywhere."""
    out = bytearray(data)
    for _ in range(generator.randint(1, 4)):
        place = generator.randrange(len(out) + 1)
        kind = generator.randrange(7)
        if kind == 0 and out:
            out[place - 1] ^= 1 << generator.randrange(8)
        elif kind == 1:
            out[place:place] = generator.choice(_RAW)
        elif kind == 2:
            del out[place : place + generator.choice((1, 2, 4, 8, 100))]
        elif kind == 3:
            del out[place:]
        elif kind == 4:
            size = generator.choice((1, 2, 4, 8))
            number = int(generator.choice(_NUMBERS[:17])) % (1 << 8 * size)
            out[place : place + size] = number.to_bytes(size, generator.choice(("little", "big")))
        elif kind == 5:
            other = generator.randrange(len(out) + 1)
            out[place:place] = out[other : other + generator.randrange(1, 64)]
        else:
            out[place : place + 1] = bytes([generator.randrange(256)])
    return bytes(out)


def mutate_value(value: Any, generator: random.Random) -> Any:
    """A JSON value with one change anywhere in it."""
    if generator.random() < 0.15 or not isinstance(value, dict | list) or not value:
        if isinstance(value, int | float) and generator.random() < 0.4:
            return generator.choice(
                (value + 1, value - 1, -value, value * 2, value * 1000, str(value))
            )
        if isinstance(value, str) and value and generator.random() < 0.4:
            place = generator.randrange(len(value))
            return value[:place] + generator.choice(_TEXTS) + value[place + 1 :]
        return generator.choice(_VALUES)
    if isinstance(value, list):
        kind, place = generator.randrange(5), generator.randrange(len(value))
        if kind == 0:
            return value[:place] + value[place + 1 :]
        if kind == 1:
            return value[:place] + [value[place]] * generator.choice((2, 3, 1000)) + value[place:]
        return [*value[:place], mutate_value(value[place], generator), *value[place + 1 :]]
    key = generator.choice(list(value))
    kind = generator.randrange(8)
    if kind == 0:
        return {name: one for name, one in value.items() if name != key}
    if kind == 1:
        return value | {str(generator.choice(_TEXTS)): generator.choice(_VALUES)}
    if kind == 2:
        return value | {key: value[generator.choice(list(value))]}
    return value | {key: mutate_value(value[key], generator)}


def deeply(generator: random.Random) -> bytes:
    """JSON nested deeper than a parser allows."""
    depth = generator.choice((10, 500, 30_000))
    return generator.choice((b"[" * depth, b'{"a":' * depth, b"[" * depth + b"]" * depth))


def mutate_json(data: bytes, generator: random.Random) -> bytes:
    """Mostly valid JSON with a change, sometimes malformed JSON."""
    kind = generator.random()
    if kind < 0.02:
        return deeply(generator)
    if kind < 0.2:
        return mutate_bytes(data, generator)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutate_bytes(data, generator)
    for _ in range(generator.choice((1, 1, 1, 2, 5))):
        value = mutate_value(value, generator)
    return json.dumps(value).encode("utf-8", "surrogatepass")


def mutate_lines(data: bytes, generator: random.Random) -> bytes:
    """JSON lines with one line changed."""
    lines = data.split(b"\n")
    place = generator.randrange(len(lines))
    lines[place] = mutate_json(lines[place], generator)
    return b"\n".join(lines)


def repacked(
    unpack: Callable[[bytes], Any], pack: Callable[[Any], bytes], share: float = 0.7
) -> Callable[[bytes, random.Random], bytes]:
    """Mutations of the unpacked contents of a file, and sometimes of its packed bytes.

    `unpack` returns a dict of values and bytes. If it or `pack` fails, packed bytes are mutated.
    """

    def mutate(data: bytes, generator: random.Random) -> bytes:
        if generator.random() >= share:
            return mutate_bytes(data, generator)
        try:
            parts = dict(unpack(data))
            name = generator.choice(sorted(parts))
            part = parts[name]
            change = mutate_bytes if isinstance(part, bytes) else mutate_value
            return pack(parts | {name: change(part, generator)})
        except Exception:  # noqa: BLE001 - they expect well-formed input
            return mutate_bytes(data, generator)

    return mutate


def one_of(ways: Sequence[Callable[[bytes, random.Random], bytes]]) -> Any:
    return lambda data, generator: generator.choice(ways)(data, generator)
