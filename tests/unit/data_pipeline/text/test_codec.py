"""Encoding and decoding of text, in every direction and unit."""

import io
import pickle
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.errors import DirectionMismatchError, TokenizerError, TokenizerMismatchError
from data_pipeline.text.codec import (
    BEGIN_PIECE,
    CHAT_PIECES,
    END_PIECE,
    Direction,
    Directions,
    TextCodec,
    TextFormat,
    Unit,
    reverse_words,
)
from tests.helpers.cpu_time import grows_linearly

Codecs = Callable[..., TextCodec]

FORMATS = [(direction, unit) for direction in Direction for unit in Unit]
MARKERS = (BEGIN_PIECE, END_PIECE, *CHAT_PIECES)
EVERY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates included
HARD_PARTS = st.sampled_from(
    [
        *MARKERS,
        "\u2581",
        "\u2585",
        "\x00",
        "\ufeff",
        "\ufffd",
        "\ud83d",
        "\ude00",
        "\U0001f600",
        "e\u0301",
        "<0x41>",
        "<0x0A>",
        "<unk>",
        "<s>",
        "\r\n",
        "\u00a0\u2028",
        "  ",
        "\t",
        "1999",
        "the captain",
    ]
)
TEXTS = st.one_of(
    st.text(EVERY_CHARACTER, max_size=60),
    st.lists(st.one_of(HARD_PARTS, st.text(EVERY_CHARACTER, max_size=4)), max_size=12).map("".join),
)


def control_ids(codec: TextCodec) -> set[int]:
    return {codec.begin_id, codec.end_id, *codec.chat_ids.values()}


def model_bytes(**settings: object) -> bytes:
    """The smallest model that megaback can use, with some settings changed."""
    model = io.BytesIO()
    arguments = {
        "sentence_iterator": iter(["the cat sat on the mat in 1999 and the dog too"] * 50),
        "model_writer": model,
        "model_type": "bpe",
        "vocab_size": 300,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "bos_piece": BEGIN_PIECE,
        "eos_piece": END_PIECE,
        "control_symbols": list(CHAT_PIECES),
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(**arguments | settings)
    return model.getvalue()


@pytest.mark.parametrize(("direction", "unit"), FORMATS)
@settings(max_examples=150)
@given(text=TEXTS)
@example(text="")
@example(text=" leading, double  and trailing ")
@example(text="\ud83d\ude00")  # two surrogates that would make one character
@example(text="\u2581 \u2581\u2581the")
def test_every_text_survives_a_round_trip(
    codec: Codecs, direction: Direction, unit: Unit, text: str
) -> None:
    chosen = codec(direction, unit)
    assert chosen.render(chosen.encode(text)) == text


def test_every_character_survives_a_round_trip(codec: Codecs) -> None:
    chosen = codec()
    text = "".join(map(chr, range(0x110000)))
    assert chosen.render(chosen.encode(text)) == text


@pytest.mark.parametrize(("direction", "unit"), FORMATS)
@given(text=TEXTS)
@example(text="".join(MARKERS))
@example(text=" ".join(MARKERS))
def test_no_text_encodes_to_a_control_id(
    codec: Codecs, direction: Direction, unit: Unit, text: str
) -> None:
    chosen = codec(direction, unit)
    assert not control_ids(chosen) & set(chosen.encode(text).tolist())


@pytest.mark.parametrize(("direction", "unit"), FORMATS)
@given(text=TEXTS)
def test_a_document_is_its_text_between_markers(
    codec: Codecs, direction: Direction, unit: Unit, text: str
) -> None:
    chosen = codec(direction, unit)
    expected = [chosen.begin_id, *chosen.encode(text).tolist(), chosen.end_id]
    assert chosen.encode_document(text).tolist() == expected


@given(text=TEXTS)
def test_document_markers_have_no_text(codec: Codecs, text: str) -> None:
    assert codec().render(codec().encode_document(text)) == text


@given(text=TEXTS)
def test_backward_ids_are_reversed_forward_ids(codec: Codecs, text: str) -> None:
    forward = codec(Direction.FORWARD).encode(text)
    assert codec(Direction.BACKWARD).encode(text).tolist() == forward.tolist()[::-1]


@given(text=TEXTS)
def test_backward_by_words_is_forward_encoding_of_reversed_words(codec: Codecs, text: str) -> None:
    forward = codec(Direction.FORWARD).encode(reverse_words(text))
    assert codec(Direction.BACKWARD, Unit.WORD).encode(text).tolist() == forward.tolist()


@given(text=TEXTS)
def test_forward_ids_do_not_depend_on_the_unit(codec: Codecs, text: str) -> None:
    by_token = codec(Direction.FORWARD, Unit.TOKEN).encode(text)
    assert codec(Direction.FORWARD, Unit.WORD).encode(text).tolist() == by_token.tolist()


def test_words_and_the_whitespace_between_them_are_reversed() -> None:
    assert reverse_words("the  cat sat") == "sat cat  the"


@given(text=TEXTS)
def test_reversing_words_twice_changes_nothing(text: str) -> None:
    assert reverse_words(reverse_words(text)) == text


@pytest.mark.parametrize(("direction", "unit"), FORMATS)
@given(data=st.data())
def test_any_list_of_ids_is_rendered(
    codec: Codecs, direction: Direction, unit: Unit, data: st.DataObject
) -> None:
    chosen = codec(direction, unit)
    ids = data.draw(st.lists(st.integers(0, chosen.vocab_size - 1), max_size=40))
    assert isinstance(chosen.render(ids), str)


@pytest.mark.parametrize(("direction", "unit"), FORMATS)
def test_a_part_of_a_character_is_rendered_as_the_replacement_character(
    codec: Codecs, direction: Direction, unit: Unit
) -> None:
    chosen = codec(direction, unit)
    ids = chosen.encode("\U0001f600")
    assert len(ids) == 4
    kept = ids[1:] if (direction, unit) == (Direction.BACKWARD, Unit.TOKEN) else ids[:-1]
    assert set(chosen.render(kept)) == {"\ufffd"}


def test_lists_and_arrays_are_rendered_equally(codec: Codecs) -> None:
    ids = codec().encode("the old captain")
    assert codec().render(ids.tolist()) == codec().render(ids) == "the old captain"


def test_ids_have_two_bytes_if_the_vocabulary_allows(codec: Codecs) -> None:
    assert codec().encode("the old captain").dtype == np.dtype("<u2")


@given(text=TEXTS)
def test_the_bytes_of_pieces_add_up_to_the_bytes_of_the_text(codec: Codecs, text: str) -> None:
    ids = codec().encode_document(text)
    assert codec().piece_num_bytes()[ids].sum() == len(text.encode("utf-8", "surrogatepass"))


def test_writable_ids_have_text_or_are_the_end_marker(codec: Codecs) -> None:
    chosen = codec()
    unknown_id = 0
    forbidden = (control_ids(chosen) | {unknown_id}) - {chosen.end_id}
    assert (
        set(chosen.writable_ids(chosen.end_id).tolist())
        == set(range(chosen.vocab_size)) - forbidden
    )


def test_by_words_the_first_new_id_is_whitespace_or_the_end(
    codec: Codecs,
) -> None:
    chosen = codec(Direction.BACKWARD, Unit.WORD)
    firsts = chosen.prompt("captain").first_ids.tolist()
    assert {chosen.render([piece_id])[-1:] for piece_id in firsts} == {"", *"\t\n\v\f\r "}


@given(text=TEXTS.filter(bool), direction=st.sampled_from(Direction), data=st.data())
def test_first_ids_are_all_that_preserve_the_given_text(
    codec: Codecs, text: str, direction: Direction, data: st.DataObject
) -> None:
    chosen = codec(direction, Unit.TOKEN)
    prompt = chosen.prompt(text)
    contains = bytes.endswith if direction is Direction.BACKWARD else bytes.startswith
    assert prompt.first_ids.tolist() == [
        piece_id
        for piece_id in range(chosen.vocab_size)
        if contains(chosen.piece_bytes(piece_id), prompt.held_back)
    ]
    first = data.draw(st.sampled_from(prompt.first_ids.tolist()))
    written = chosen.render([*prompt.ids, first])
    is_whole = written.endswith if direction is Direction.BACKWARD else written.startswith
    assert is_whole(text)


def test_a_given_word_can_continue_or_end(codec: Codecs) -> None:
    chosen = codec(Direction.BACKWARD, Unit.TOKEN)
    prompt = chosen.prompt("the")
    first_texts = {chosen.render([*prompt.ids, first]) for first in prompt.first_ids.tolist()}
    assert {"the", " the"} <= first_texts


def test_an_empty_prompt_allows_every_first_id(codec: Codecs) -> None:
    chosen = codec()
    prompt = chosen.prompt("")
    assert (prompt.ids, prompt.first_ids.tolist()) == (
        [chosen.begin_id],
        chosen.writable_ids(chosen.end_id).tolist(),
    )


def test_a_codec_survives_pickling(codec: Codecs) -> None:
    chosen = codec(Direction.BACKWARD, Unit.WORD)
    copy = pickle.loads(pickle.dumps(chosen))
    text = "the  old captain \u2581\ud800"
    assert (copy.format, copy.encode(text).tolist()) == (
        chosen.format,
        chosen.encode(text).tolist(),
    )


@pytest.mark.parametrize(
    "content",
    [b"", b"\x00", b"not a model", bytes(1000)],
    ids=["no bytes", "a zero byte", "text", "zeros"],
)
def test_an_invalid_model_file_is_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "tokenizer.model"
    path.write_bytes(content)
    with pytest.raises(TokenizerError, match=re.escape(str(path))):
        TextCodec.load(path, Direction.BACKWARD, Unit.TOKEN)


def test_a_truncated_model_is_refused(tokenizer_path: Path) -> None:
    whole = tokenizer_path.read_bytes()
    with pytest.raises(TokenizerError, match="not a SentencePiece model"):
        TextCodec(whole[: len(whole) // 2], Direction.BACKWARD, Unit.TOKEN)


@pytest.mark.parametrize("piece", [b"\xff\xfe\xfd", b"<0xZZ>"], ids=ascii)
def test_a_model_with_invalid_pieces_is_refused(tokenizer_path: Path, piece: bytes) -> None:
    whole = tokenizer_path.read_bytes()
    found = re.search({3: rb"\n\x03[a-z]{3}", 6: rb"\n\x06<0x41>"}[len(piece)], whole)
    assert found is not None
    broken = whole[: found.start() + 2] + piece + whole[found.end() :]
    with pytest.raises(TokenizerError):
        TextCodec(broken, Direction.BACKWARD, Unit.TOKEN)


def test_a_missing_model_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "nowhere.model"
    with pytest.raises(TokenizerError, match=re.escape(str(path))):
        TextCodec.load(path, Direction.BACKWARD, Unit.TOKEN)


@pytest.mark.parametrize(
    ("changed", "piece"),
    [
        ({"bos_piece": "<s>"}, BEGIN_PIECE),
        ({"eos_piece": "</s>"}, END_PIECE),
        ({"control_symbols": list(CHAT_PIECES[:-1])}, CHAT_PIECES[-1]),
        ({"control_symbols": [], "user_defined_symbols": list(CHAT_PIECES)}, CHAT_PIECES[0]),
        ({"byte_fallback": False, "hard_vocab_limit": False}, "<0x00>"),
    ],
    ids=["no begin", "no end", "a chat piece missing", "chat pieces that text can spell", "bytes"],
)
def test_a_model_without_a_needed_piece_is_refused(changed: dict[str, object], piece: str) -> None:
    with pytest.raises(TokenizerError, match=re.escape(piece)):
        TextCodec(model_bytes(**changed), Direction.BACKWARD, Unit.TOKEN)


@pytest.mark.parametrize(
    "changed",
    [
        {"normalization_rule_name": "nmt_nfkc"},
        {"add_dummy_prefix": True},
        {"remove_extra_whitespaces": True},
    ],
    ids=lambda changed: next(iter(changed)),
)
def test_a_model_that_alters_text_is_refused(changed: dict[str, object]) -> None:
    with pytest.raises(TokenizerError):
        TextCodec(model_bytes(**changed), Direction.BACKWARD, Unit.TOKEN)


@pytest.mark.parametrize(
    ("field", "value", "error", "values"),
    [
        ("tokenizer_sha256", "b" * 64, TokenizerMismatchError, ["a" * 12, "b" * 12]),
        ("direction", Direction.FORWARD, DirectionMismatchError, ["backward", "forward"]),
        ("unit", Unit.WORD, DirectionMismatchError, ["token", "word"]),
    ],
)
def test_a_mismatch_names_both_artifacts_and_both_values(
    field: str, value: object, error: type[Exception], values: list[str]
) -> None:
    ours = TextFormat(Direction.BACKWARD, Unit.TOKEN, "a" * 64)
    with pytest.raises(error) as caught:
        ours.require_same(replace(ours, **{field: value}), "the run", "the shards")
    message = str(caught.value)
    assert [part for part in (*values, "the run", "the shards") if part not in message] == []


def test_equal_formats_can_be_used_together() -> None:
    ours = TextFormat(Direction.BACKWARD, Unit.TOKEN, "a" * 64)
    ours.require_same(TextFormat.from_dict(ours.to_dict()), "the run", "the shards")


@pytest.mark.parametrize("reserved", ["\u2581", "\ud800"])
def test_byte_spelled_characters_take_linear_time(codec: Codecs, reserved: str) -> None:
    chosen = codec()
    assert grows_linearly(lambda size: chosen.encode(f"a{reserved}" * size), 50_000)
    few = reserved.join(map(str, range(2000)))
    assert chosen.render(chosen.encode(few)) == few
    parts = [chosen.encode(part).tolist() for part in re.split(f"({reserved})", few)]
    assert chosen.encode(few).tolist() == [i for part in reversed(parts) for i in part]


def test_the_first_id_of_a_model_of_both_directions_names_it(codec: Codecs) -> None:
    single = codec()
    backward, forward = (
        TextCodec(single.model_bytes, direction, Unit.TOKEN, both=True) for direction in Direction
    )

    assert (backward.begin_id, backward.end_id) == (single.begin_id, single.end_id)
    assert (forward.begin_id, forward.end_id) == (single.end_id, single.begin_id)
    document = forward.encode_document("the old captain")
    assert document.tolist() == backward.encode_document("the old captain")[::-1].tolist()
    assert forward.prompt("the old captain").end_id == forward.end_id
    assert forward.newest([7, 8, 9], 2) == [forward.begin_id, 9]
    assert single.newest([7, 8, 9], 2) == [8, 9]
    copy = pickle.loads(pickle.dumps(forward))
    assert (copy.format, copy.begin_id) == (forward.format, forward.begin_id)


def test_the_format_of_both_directions_is_used_in_either_and_differs_from_one() -> None:
    both = TextFormat(Direction.BACKWARD, Unit.TOKEN, "5" * 64, both=True)

    assert both.to_dict()["direction"] == "both"
    assert TextFormat.from_dict(both.to_dict()) == both
    forward = both.using(Direction.FORWARD, "a")
    assert (forward.direction, forward.directions) == (Direction.FORWARD, Directions.BOTH)
    for direction in Direction:
        single = replace(both, direction=direction, both=False)
        assert both.as_base_of(single) == single
        assert single.as_base_of(both) == single
    with pytest.raises(DirectionMismatchError, match="'both' and b has direction 'backward'"):
        both.require_same(replace(both, both=False), "a", "b")
    with pytest.raises(DirectionMismatchError, match="a writes backward only, not forward"):
        replace(both, both=False).using(Direction.FORWARD, "a")
