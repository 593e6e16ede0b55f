"""Byte-level BPE of a `tokenizer.json` (GPT-2, Llama 3, Qwen, SmolLM, ...) as a tokenizer.

Ids are those of Hugging Face's `tokenizers` without special tokens. What would not be exact is
refused by name (`tokenizer_json.py`, and here): each byte has a piece, and no text becomes a
special token.
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.errors import TokenizerError
from data_pipeline.text.bpe_encoder import BpeEncoder, fastest_bpe_encoder
from data_pipeline.text.encoder import Encoder
from data_pipeline.text.tokenizer import dtype_of_ids
from data_pipeline.text.tokenizer_json import (
    IMPORT,
    OTHERS,
    characters_of_bytes,
    fields_of,
    merges_of,
    no_tokenizer,
    require_exact,
)


class BpeTokenizer:
    """A byte-level BPE tokenizer whose special tokens are control pieces."""

    unencodable = ""
    advice = f"add what it lacks, and remove what changes text, with {IMPORT}"

    def __init__(self, content: bytes) -> None:
        """Raises TokenizerError when the bytes are not a tokenizer that megaback can use."""
        from tokenizers import Tokenizer

        self._content = content
        fields = fields_of(content)
        require_exact(fields)
        self.vocab_size = _vocab_size(fields)
        self.id_dtype = dtype_of_ids(self.vocab_size, "use a smaller one")
        added = fields["added_tokens"]
        self._control_ids = {token["content"]: token["id"] for token in added if token["special"]}
        self.piece_bytes: Sequence[bytes] = _bytes_of_pieces(fields, self.vocab_size)
        vocab = fields["model"]["vocab"]
        try:
            byte_ids = [vocab[character] for character in characters_of_bytes()]
        except KeyError as error:
            byte = characters_of_bytes().index(error.args[0])
            raise TokenizerError(
                f"the tokenizer lacks a piece for the byte 0x{byte:02X}; {OTHERS}"
            ) from None
        self.byte_ids = np.array(byte_ids, dtype=self.id_dtype)
        self._require_control_ids_apart(fields, byte_ids)
        try:
            library: Any = Tokenizer.from_buffer(content)
        except (ValueError, TypeError) as error:
            raise no_tokenizer(" ".join(str(error).split())) from None
        library.encode_special_tokens = True  # as text, not as special tokens
        for token in added:
            if library.token_to_id(token["content"]) != token["id"]:
                raise TokenizerError(
                    f"the id {token['id']} of the added token {token['content']!r} is not the next "
                    "free one, so libraries number it otherwise; use the file of another release"
                )
        self._library = library
        self.reference: Encoder = BpeEncoder(library, self.id_dtype)

    @cached_property
    def fastest(self) -> Encoder:
        fields = fields_of(self._content)
        return fastest_bpe_encoder(fields, self.piece_bytes, self.reference, self.id_dtype)

    def piece(self, piece_id: int) -> str:
        spelling: str | None = self._library.id_to_token(piece_id)
        return f"<unused {piece_id}>" if spelling is None else spelling

    def control_id(self, piece: str) -> int | None:
        return self._control_ids.get(piece)

    def _require_control_ids_apart(
        self, fields: Mapping[str, Any], byte_ids: Sequence[int]
    ) -> None:
        """Raises TokenizerError if the BPE model itself could produce a control id."""
        model = fields["model"]
        made = set(byte_ids)
        if model.get("ignore_merges"):
            made.update(model["vocab"].values())
        else:
            made.update(model["vocab"].get(left + right, -1) for left, right in merges_of(model))
        for content, control_id in self._control_ids.items():
            if control_id in made:
                raise TokenizerError(
                    f"text can become the special token {content!r}, which is a piece of the "
                    f"vocabulary too; {OTHERS}"
                )


def _vocab_size(fields: Mapping[str, Any]) -> int:
    """One more than the last id. Raises TokenizerError if two pieces share one."""
    vocab: dict[str, int] = fields["model"]["vocab"]
    spellings = {piece_id: piece for piece, piece_id in vocab.items()}
    if len(spellings) != len(vocab):
        raise no_tokenizer("two of its pieces have one id")
    for token in fields["added_tokens"]:
        if spellings.get(token["id"], token["content"]) != token["content"]:
            raise no_tokenizer(f"two of its pieces have the id {token['id']}")
        spellings[token["id"]] = token["content"]
    return max(spellings) + 1


def _bytes_of_pieces(fields: Mapping[str, Any], vocab_size: int) -> list[bytes]:
    """Text of each id; b"" for special tokens. Raises TokenizerError for one id of two texts."""
    byte_of = {ord(character): byte for byte, character in enumerate(characters_of_bytes())}
    is_piece = set(map(chr, byte_of)).issuperset
    of_ids = [b""] * vocab_size
    for piece, piece_id in fields["model"]["vocab"].items():
        if is_piece(piece):  # no text becomes another
            of_ids[piece_id] = piece.translate(byte_of).encode("latin-1")
    for token in fields["added_tokens"]:
        content = b"" if token["special"] else token["content"].encode("utf-8", "surrogatepass")
        if content and of_ids[token["id"]] not in (b"", content):
            raise TokenizerError(
                f"the added token {token['content']!r:.60} is a piece of other bytes too; {OTHERS}"
            )
        of_ids[token["id"]] = content
    return of_ids
