"""New text of an export's model, compared with megaback's incremental detokenization."""

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from data_pipeline.text.codec import Direction, TextCodec, Unit
from data_pipeline.text.incremental import IncrementalDetokenizer, StopTexts
from tests.helpers.exports import of_formats
from tools.export.remote_code.new_text_megaback import NewText, stop_texts

Codecs = Callable[..., TextCodec]


@of_formats
@given(
    ids=st.lists(st.integers(0, 599), max_size=40),
    stops=st.lists(st.sampled_from(["e", "th", "\n", " t", "in ", "\u00e9"]), max_size=2),
    given_text=st.sampled_from(["", "the end.", "☃"]),
)
@example(ids=[], stops=["e"], given_text="the end.")
def test_text_grows_and_stops_as_megaback_streams_it(
    direction: Direction,
    unit: Unit,
    codec: Codecs,
    ids: list[int],
    stops: list[str],
    given_text: str,
) -> None:
    """After every id, whatever bytes and stop texts they make."""
    ours = codec(direction, unit)
    prompt = ours.prompt(given_text)
    if ids:
        ids[0] = int(prompt.first_ids[ids[0] % len(prompt.first_ids)])
    texts = [ours.piece_bytes(i) for i in range(ours.vocab_size)]
    new = NewText(texts, direction.value, unit.value, prompt.held_back, tuple(stops))
    detokenizer = IncrementalDetokenizer(ours, prompt.held_back)
    stop = StopTexts(stops, grows_leftwards=new.grows_leftwards)

    expected = ""
    for number, new_id in enumerate(ids):
        expected = new.joined(stop.add(detokenizer.add(new_id)), expected)
        assert new.read(ids[: number + 1], is_whole=False) == (expected, stop.is_found)
    expected = new.joined(stop.add(detokenizer.finish()), expected)
    expected = new.joined(stop.finish(), expected)
    assert new.read(ids) == (expected, stop.is_found)


@pytest.mark.parametrize("wrong", ["", [""], [3], 7])
def test_stop_texts_that_are_no_texts_are_refused(wrong: Any) -> None:
    with pytest.raises(TypeError, match="`stop` takes"):
        stop_texts(wrong)
