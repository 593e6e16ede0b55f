"""XXH64 collisions: other content with the same checksum, as it is not a cryptographic hash.

https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md, for an input of 40 bytes with seed
0: one stripe of 32, and a tail of 8 whose steps are all invertible.
"""

import struct

_P1, _P2 = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F
_P4 = 0x85EBCA77C2B2AE63
_ALL = (1 << 64) - 1


def forged(content: bytes, head: bytes) -> bytes:
    """40 bytes that begin with a head of 32, with the XXH64 of `content`, also of 40 bytes."""
    assert (len(content), len(head)) == (40, 32)
    needed = _turned((_with_tail(content) - _P4) * pow(_P1, -1, 1 << 64) & _ALL, 37)
    mixed = needed ^ _before_tail(head)
    tail = _turned(mixed * pow(_P1, -1, 1 << 64) & _ALL, 33) * pow(_P2, -1, 1 << 64) & _ALL
    return head + struct.pack("<Q", tail)


def _turned(number: int, bits: int) -> int:
    return (number << bits | number >> (64 - bits)) & _ALL


def _round(state: int, lane: int) -> int:
    return _turned((state + lane * _P2) & _ALL, 31) * _P1 & _ALL


def _before_tail(head: bytes) -> int:
    seeds = (_P1 + _P2, _P2, 0, -_P1)
    states = [
        _round(seed & _ALL, lane)
        for seed, lane in zip(seeds, struct.unpack("<4Q", head), strict=True)
    ]
    turns = zip(states, (1, 7, 12, 18), strict=True)
    state = sum(_turned(one, bits) for one, bits in turns) & _ALL
    for one in states:
        state = ((state ^ _round(0, one)) * _P1 + _P4) & _ALL
    return state + 40 & _ALL


def _with_tail(content: bytes) -> int:
    (tail,) = struct.unpack("<Q", content[32:])
    return (_turned(_before_tail(content[:32]) ^ _round(0, tail), 27) * _P1 + _P4) & _ALL
