"""Byte-level BPE of a tokenizer.json: exact in every direction and unit, or refused by name."""

import copy
import json
import pickle
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.errors import TokenizerError
from data_pipeline.text.codec import BEGIN_PIECE, CHAT_PIECES, END_PIECE, Direction, TextCodec, Unit
from data_pipeline.text.incremental import IncrementalDetokenizer
from data_pipeline.tokenizer.markers import with_markers
from tests.helpers.bpe import qwen_content, qwen_fields

FORMATS = [(direction, unit) for direction in Direction for unit in Unit]
MARKERS = (BEGIN_PIECE, END_PIECE, *CHAT_PIECES)
HARD_PARTS = [*MARKERS, "\u2581", "\x00", "\ud83d", "\U0001f600", "e\u0301", "\u00e9", "<think>"]
HARD_PARTS += ["<think", "\u0120", "<|box_start|>", "<tool_call> ", "\r\n", "\u00a0\u2028", "  "]
TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*HARD_PARTS, "the captain", "1999"]),
        st.text(st.characters(exclude_categories=()), max_size=6),
    ),
    max_size=10,
).map("".join)


def content() -> bytes:
    return with_markers(qwen_content()).content


def codec(direction: Direction = Direction.BACKWARD, unit: Unit = Unit.TOKEN) -> TextCodec:
    return TextCodec(content(), direction, unit)


CODECS = [codec(direction, unit) for direction, unit in FORMATS]


@given(texts=st.lists(TEXTS, max_size=3))
@pytest.mark.parametrize("is_much", [False, True])
def test_any_text_survives_and_becomes_no_control_id(is_much: bool, texts: list[str]) -> None:
    for one in CODECS:
        one._characters_before_fastest = 0 if is_much else 1 << 40
        for text, ids in zip(texts, one.encode_all(texts), strict=True):
            assert one.render(ids) == text
            assert all(map(one.piece_bytes, ids.tolist()))


def test_every_character_survives() -> None:
    one = codec()
    for first in range(0, 0x110000, 0x8000):
        text = "".join(map(chr, range(first, first + 0x8000)))
        assert one.render(one.encode(text)) == text


def test_ids_are_those_of_the_library_without_special_tokens() -> None:
    from tokenizers import Tokenizer

    library: Any = Tokenizer.from_buffer(qwen_content(normalizer=None))
    library.encode_special_tokens = True
    text = "The captain's <think>old ship</think>\n\n sailed <|im_end|> in 1999, caf\u00e9 \u8239!"
    expected = library.encode(text, add_special_tokens=False).ids
    assert codec().encode(text).tolist() == expected[::-1]
    assert codec(Direction.FORWARD).encode(text).tolist() == expected
    assert library.token_to_id("<think>") in expected


def test_kitoken_encodes_much_text_with_equal_ids() -> None:
    pytest.importorskip("kitoken")
    one = codec(Direction.FORWARD)
    assert one.encoder_name == "kitoken"
    texts = ["the captain's ship  sailed\n\n on", "a \U0001f600 b", "x <think> y", "\ud800 z"]
    slowly = one.encode_all(texts)
    one._characters_before_fastest = 0
    assert [ids.tolist() for ids in one.encode_all(texts)] == [ids.tolist() for ids in slowly]


def test_a_prompt_is_healed_and_grows_without_pieces_of_characters() -> None:
    one = codec()
    prompt = one.prompt("caf\u00e9 is not supported")
    assert prompt.held_back
    assert all(one.piece_bytes(int(i)).endswith(prompt.held_back) for i in prompt.first_ids)
    detokenizer = IncrementalDetokenizer(one)
    text = "na\u00efve \U0001f600 \u8239"
    parts = [detokenizer.add(int(i)) for i in one.encode(text)]
    assert "".join(reversed([*parts, detokenizer.finish()])) == text


def test_bytes_of_pieces_are_counted_and_a_copy_is_equal() -> None:
    one = codec()
    text = "the captain \u8239"
    assert one.piece_num_bytes()[one.encode(text)].sum() == len(text.encode())
    assert one.piece_num_bytes()[[one.begin_id, one.end_id]].sum() == 0
    again = pickle.loads(pickle.dumps(one))
    assert again.format == one.format
    assert again.file_name == "tokenizer.json"


def _with(**changes: Any) -> dict[str, Any]:
    return {**qwen_fields(), "normalizer": None, **changes}


def _model(**changes: Any) -> dict[str, Any]:
    fields = copy.deepcopy(_with())
    fields["model"].update(changes)
    return fields


def _without_byte() -> dict[str, Any]:
    fields = copy.deepcopy(_with())
    del fields["model"]["vocab"]["\u0120"]
    fields["model"]["merges"] = []
    return fields


def _token(**changes: Any) -> dict[str, Any]:
    fields = copy.deepcopy(_with())
    fields["added_tokens"][-1].update(changes)
    return fields


_BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
_REMOVING = {"type": "Split", "pattern": {"String": " "}, "behavior": "Removed", "invert": False}
REFUSED = {
    "NFC.*megaback import tokenizer": _with(normalizer={"type": "NFC"}),
    "Lowercase": _with(normalizer={"type": "Lowercase"}),
    "truncation": _with(truncation={"max_length": 8}),
    "Metaspace": _with(pre_tokenizer={"type": "Metaspace", "replacement": "\u2581"}),
    "ByteLevel": _with(pre_tokenizer={"type": "Digits", "individual_digits": True}),
    "add_prefix_space": _with(pre_tokenizer={**_BYTES, "add_prefix_space": True}),
    "'Split' loses text": _with(
        pre_tokenizer={"type": "Sequence", "pretokenizers": [_REMOVING, _BYTES]}
    ),
    "byte_fallback": _model(byte_fallback=True),
    "dropout": _model(dropout=0.1),
    "Unigram": _model(type="Unigram"),
    "byte 0x20": _without_byte(),
    "lstrip": _token(lstrip=True),
    "next free one": _token(id=5000),
    "special token 'he'": _token(content="he", special=True, id=-1),
    "lacks the control piece": _with(),
    "another form": _model(vocab={"a": "b"}),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_not_exact_is_refused_by_name(message: str) -> None:
    fields = REFUSED[message]
    if fields["added_tokens"][-1]["id"] == -1:
        fields["added_tokens"][-1]["id"] = fields["model"]["vocab"]["he"]
    with pytest.raises(TokenizerError, match=message):
        TextCodec(json.dumps(fields).encode(), Direction.BACKWARD, Unit.TOKEN)


@given(data=st.data())
def test_a_mutated_file_is_refused_or_round_trips(data: st.DataObject) -> None:
    mutated = bytearray(content())
    for _ in range(data.draw(st.integers(1, 3))):
        place = data.draw(st.integers(1, len(mutated) - 1))
        mutated[place : place + data.draw(st.integers(0, 3))] = data.draw(st.binary(max_size=3))
    try:
        one = TextCodec(bytes(mutated), Direction.BACKWARD, Unit.TOKEN)
    except TokenizerError:
        return
    text = "".join(HARD_PARTS)
    assert one.render(one.encode(text)) == text
