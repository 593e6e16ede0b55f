"""Markers in tokenizers of other models."""

import copy
from typing import Any

import pytest

from data_pipeline.errors import TokenizerError
from data_pipeline.text.codec import BEGIN_PIECE, CHAT_PIECES, END_PIECE, Direction, TextCodec, Unit
from data_pipeline.tokenizer.markers import with_markers
from tests.helpers.bpe import NUM_IDS, qwen_content, qwen_fields

MARKERS = (BEGIN_PIECE, END_PIECE, *CHAT_PIECES)


def forward(content: bytes) -> TextCodec:
    return TextCodec(content, Direction.FORWARD, Unit.TOKEN)


def _content_with(*special: str) -> bytes:
    """A file whose special tokens are these."""
    fields: dict[str, Any] = copy.deepcopy(qwen_fields())
    flag = fields["added_tokens"][0]
    first = flag["id"]
    fields["added_tokens"] = [
        {**flag, "id": first + index, "content": content} for index, content in enumerate(special)
    ]
    return qwen_content(added_tokens=fields["added_tokens"], normalizer=None)


def test_what_is_there_stays_and_the_rest_follows_the_last_id() -> None:
    marked = with_markers(qwen_content())
    there = {t["content"]: t["id"] for t in qwen_fields()["added_tokens"]}
    new = [piece for piece in MARKERS if piece not in there]
    expected = {**there, **{piece: NUM_IDS + index for index, piece in enumerate(new)}}
    assert marked.marker_ids == {piece: expected[piece] for piece in MARKERS}
    assert marked.vocab_size == NUM_IDS + len(new) == NUM_IDS + marked.num_added
    assert [what.split(":")[0] for what in marked.removed] == ["normalizer NFC"]
    assert not marked.renamed


def test_a_sequence_of_nfc_alone_is_removed_as_nfc_is() -> None:
    sequence = {"type": "Sequence", "normalizers": [{"type": "NFC"}]}
    assert with_markers(qwen_content(normalizer=sequence)) == with_markers(qwen_content())
    longer = {**sequence, "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}
    with pytest.raises(TokenizerError, match="normalizer 'Sequence'"):
        with_markers(qwen_content(normalizer=longer))


def test_unused_ids_fill_the_rows_of_the_embedding() -> None:
    marked = with_markers(qwen_content(), NUM_IDS + 20)
    assert marked.vocab_size == forward(marked.content).vocab_size == NUM_IDS + 20
    writable = forward(marked.content).writable_ids(marked.marker_ids[END_PIECE])
    assert writable.max() < NUM_IDS


def test_more_rows_than_the_embedding_has_are_reported() -> None:
    assert with_markers(qwen_content(), NUM_IDS + 2).vocab_size > NUM_IDS + 2
    with pytest.raises(TokenizerError, match=f"{NUM_IDS:,} ids, but the embedding"):
        with_markers(qwen_content(), NUM_IDS - 1)


def test_reserved_tokens_and_the_model_s_own_markers_are_renamed() -> None:
    reserved = [f"<|reserved_special_token_{number}|>" for number in range(8)]
    marked = with_markers(_content_with("<|begin_of_text|>", "<|end_of_text|>", *reserved))
    assert marked.num_added == 0
    assert marked.renamed[BEGIN_PIECE] == "<|begin_of_text|>"
    assert marked.renamed[END_PIECE] == "<|end_of_text|>"
    assert [marked.renamed[piece] for piece in CHAT_PIECES] == reserved[: len(CHAT_PIECES)]


def test_a_marked_file_is_left_as_it_is() -> None:
    content = with_markers(qwen_content(), NUM_IDS + 20).content
    assert with_markers(qwen_content(), NUM_IDS + 20).content == content
    again = with_markers(content, NUM_IDS + 20)
    assert (again.content, again.num_added, again.removed) == (content, 0, ())


def test_text_keeps_its_ids() -> None:
    text = "The captain's old ship sailed in 1999 <think>"
    before = with_markers(qwen_content())
    after = with_markers(qwen_content(), NUM_IDS + 100)
    assert forward(before.content).encode(text).tolist() == (
        forward(after.content).encode(text).tolist()
    )
