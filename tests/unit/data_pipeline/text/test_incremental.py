"""Incremental detokenization: whole characters, and parts that join to the whole text."""

from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.incremental import IncrementalDetokenizer, StopTexts
from tests.helpers.cpu_time import grows_linearly

Codecs = Callable[..., TextCodec]

FORMATS = [
    (Direction.BACKWARD, Unit.TOKEN),
    (Direction.BACKWARD, Unit.WORD),
    (Direction.FORWARD, Unit.TOKEN),
]
HARD = ["naïve — 你好, мир", "👩‍👩‍👧 fam", "שלום עולם", "\u2581 \n\n  x", "", "a  b\t c "]


def parts_of(codec: TextCodec, ids: Sequence[int], held_back: bytes = b"") -> list[str]:
    growing = IncrementalDetokenizer(codec, held_back)
    return [*(growing.add(new_id) for new_id in ids), growing.finish()]


def joined(codec: TextCodec, parts: Sequence[str]) -> str:
    is_backward = codec.format.direction is Direction.BACKWARD
    return "".join(reversed(parts) if is_backward else parts)


@pytest.mark.parametrize("text_format", FORMATS, ids=str)
@given(ids=st.lists(st.integers(0, 599), max_size=60))
@example(ids=[])
def test_parts_join_to_the_whole_without_broken_characters(
    codec: Codecs, text_format: tuple[Direction, Unit], ids: list[int]
) -> None:
    of_format = codec(*text_format)
    parts = parts_of(of_format, ids)
    whole = of_format.render(ids).encode("utf-8", "surrogatepass").decode("utf-8", "replace")
    assert joined(of_format, parts) == whole
    for part in parts:
        part.encode()


@given(ids=st.lists(st.integers(0, 255), max_size=24))
def test_any_bytes_are_decoded_as_in_one_call(codec: Codecs, ids: list[int]) -> None:
    """Byte pieces only, most of which form no characters."""
    of_format = codec()
    spelled = [_byte_id(of_format, value) for value in ids]
    raw = bytes(reversed(ids))
    assert joined(of_format, parts_of(of_format, spelled)) == raw.decode("utf-8", "replace")


def _byte_id(codec: TextCodec, value: int) -> int:
    return next(i for i in range(codec.vocab_size) if codec.piece(i) == f"<0x{value:02X}>")


@pytest.mark.parametrize("text_format", FORMATS, ids=str)
@given(text=st.one_of(st.text(), st.sampled_from(HARD)))
def test_parts_join_to_the_text_without_replacement_characters(
    codec: Codecs, text_format: tuple[Direction, Unit], text: str
) -> None:
    of_format = codec(*text_format)
    parts = parts_of(of_format, of_format.encode(text).tolist())
    assert joined(of_format, parts) == text
    assert ("�" in "".join(parts)) == ("�" in text)


@pytest.mark.parametrize("direction", Direction)
def test_the_held_back_bytes_are_not_emitted(codec: Codecs, direction: Direction) -> None:
    of_format = codec(direction)
    given_text = "is late." if direction is Direction.BACKWARD else "the old cap"
    prompt = of_format.prompt(given_text)
    longest = max(prompt.first_ids.tolist(), key=lambda i: len(of_format.piece_bytes(i)))
    growing = IncrementalDetokenizer(of_format, prompt.held_back)
    written = growing.add(longest) + growing.finish()
    whole = of_format.render([*prompt.ids, longest])
    assert whole == joined(of_format, [given_text, written])
    assert written


def test_a_backward_character_is_emitted_with_its_first_byte(codec: Codecs) -> None:
    of_format = codec()
    growing = IncrementalDetokenizer(of_format)
    ids = [_byte_id(of_format, value) for value in reversed("€".encode())]
    assert [growing.add(piece_id) for piece_id in ids] == ["", "", "€"]


@given(
    text=st.text("ab\n", max_size=30),
    cuts=st.lists(st.integers(0, 30)),
    stops=st.lists(st.text("ab\n", min_size=1, max_size=4), max_size=3),
    grows_leftwards=st.booleans(),
)
def test_a_stop_text_is_found_however_the_text_is_split(
    text: str, cuts: list[int], stops: list[str], grows_leftwards: bool
) -> None:
    edges = [0, *sorted(cut for cut in cuts if cut < len(text)), len(text)]
    finder = StopTexts(stops, grows_leftwards=grows_leftwards)
    parts = [text[a:b] for a, b in pairwise(edges)]
    ordered = list(reversed(parts)) if grows_leftwards else parts
    out = [*(finder.add(part) for part in ordered), finder.finish()]
    found = "".join(reversed(out) if grows_leftwards else out)

    shown = text[::-1] if grows_leftwards else text
    turned = [stop[::-1] if grows_leftwards else stop for stop in stops]
    ends = [n for n in range(len(shown) + 1) if any(shown[:n].endswith(stop) for stop in turned)]
    expected = shown
    if ends:
        expected = shown[: ends[0]]
        cut = max(len(stop) for stop in turned if expected.endswith(stop))
        expected = expected[: len(expected) - cut]
    assert found == (expected[::-1] if grows_leftwards else expected)
    assert finder.is_found == bool(ends)


def test_a_possible_beginning_of_a_stop_text_is_held_back() -> None:
    finder = StopTexts(["\n\n"], grows_leftwards=True)
    assert [finder.add("end."), finder.add("\nthe "), finder.add("a"), finder.finish()] == [
        "end.",
        "the ",
        "a\n",
        "",
    ]


@pytest.mark.parametrize(("run", "end"), [("7", " "), (" ", "7")])
def test_a_giant_word_takes_linear_time_and_is_emitted_whole(
    codec: Codecs, run: str, end: str
) -> None:
    of_format = codec(Direction.BACKWARD, Unit.WORD)
    (run_id,), (end_id,) = of_format.encode(run).tolist(), of_format.encode(end).tolist()

    def write(size: int) -> list[str]:
        return parts_of(of_format, [*[run_id] * size, end_id])

    assert grows_linearly(write, 3000)
    parts = write(3000)
    assert [part for part in parts if part] == [run * 3000, end]
