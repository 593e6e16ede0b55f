"""Untrusted SentencePiece models: refused with an error, or texts survive a round trip."""

from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import TokenizerError
from data_pipeline.text.codec import Direction, TextCodec, Unit

Codecs = Callable[..., TextCodec]
_TEXT = "The old captain said: ☃, and fi\ufb01sh \uff21.\n" * 3


def made(content: bytes) -> TextCodec | None:
    try:
        return TextCodec(content, Direction.BACKWARD, Unit.TOKEN)
    except TokenizerError:
        return None


@given(data=st.data())
def test_a_mutated_model_is_refused_or_round_trips(data: st.DataObject, codec: Codecs) -> None:
    content = bytearray(codec().model_bytes)
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(st.integers(0, len(content) - 1))
        length = data.draw(st.sampled_from([1, 1, 2, 8, 300]))
        kind = data.draw(st.sampled_from(["replace", "repeat", "drop", "cut"]))
        if kind == "replace":
            content[place : place + length] = data.draw(st.binary(min_size=1, max_size=length))
        elif kind == "repeat":
            content[place:place] = content[place : place + length]
        elif kind == "drop" and len(content) > length:
            del content[place : place + length]
        elif kind == "cut" and place:
            del content[place:]
    found = made(bytes(content))
    if found is not None:
        assert found.render(found.encode(_TEXT)) == _TEXT
        found._characters_before_fastest = 0
        assert found.render(found.encode(_TEXT)) == _TEXT


@pytest.mark.parametrize("old", [b"<0x41>", b"captain", b"<|im_end|>"])
def test_an_invalid_piece_is_refused(old: bytes, codec: Codecs) -> None:
    content = codec().model_bytes
    assert old in content
    for new in (b"<0xZZ>", b"\xff" * len(old), b"\0" * len(old)):
        made(content.replace(old, new[: len(old)].ljust(len(old), b"\xfe")))


@pytest.mark.parametrize("content", [b"", b"\0", b"\x0a\xff\xff\xff\xff\x0f", b"\x0a" * 100_000])
def test_an_invalid_model_is_refused(content: bytes) -> None:
    assert made(content) is None
