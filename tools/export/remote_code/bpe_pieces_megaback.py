"""Pieces of the vocabulary of a model that writes backward, by byte-level BPE of `tokenizers`.

Encodes text forward and exactly: every Python string is decoded to itself, and no text becomes a
control id, whatever it spells.
"""

import json
import re
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

BEGIN_PIECE = "<|startoftext|>"
END_PIECE = "<|endoftext|>"
# Not tokenizer.json: stock classes would load a file of that name, and read forward.
VOCABULARY_NAME = "megaback.bpe.json"
_SURROGATES = re.compile("([\ud800-\udfff]+)")


class Pieces:
    """Vocabulary of a byte-level BPE tokenizer whose special tokens are control pieces."""

    def __init__(self, path: str) -> None:
        content = Path(path).read_bytes()
        fields = json.loads(content)
        self._tokenizer = Tokenizer.from_buffer(content)
        self._tokenizer.encode_special_tokens = True  # as text, not as special tokens
        self._vocabulary: dict[str, int] = fields["model"]["vocab"]
        added = fields["added_tokens"]
        self._added: dict[int, str] = {token["id"]: token["content"] for token in added}
        self._control_ids = {token["id"] for token in added if token["special"]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._tokenizer.encode_special_tokens = True  # which the library does not pickle

    def __len__(self) -> int:
        return 1 + max(self._spellings)

    def encode(self, text: str) -> list[int]:
        """Ids of a text in the order of the text, without markers."""
        ids: list[int] = []
        for index, part in enumerate(_SURROGATES.split(text)):
            if index % 2:
                characters = _characters_of_bytes()
                raw = part.encode("utf-8", "surrogatepass")
                ids += [self._vocabulary[characters[value]] for value in raw]
            else:
                ids += self._tokenizer.encode(part, add_special_tokens=False).ids
        return ids

    def id_of(self, spelling: str) -> int:
        """Id of a piece. Raises ValueError if there is none."""
        piece_id = self._tokenizer.token_to_id(spelling)
        if piece_id is None:
            raise ValueError(f"{spelling!r} is not a piece of the vocabulary")
        return int(piece_id)

    def spelling(self, piece_id: int) -> str:
        """Piece of an id, as the vocabulary lists it."""
        return self._spellings.get(piece_id, f"<unused {piece_id}>")

    def is_control(self, piece_id: int) -> bool:
        """Whether an id is a marker, which no text is encoded to."""
        return piece_id in self._control_ids

    @cached_property
    def texts(self) -> list[bytes]:
        """UTF-8 text of each id, which may be a part of a character; b"" for control ids."""
        byte_of = {ord(character): byte for byte, character in enumerate(_characters_of_bytes())}
        is_piece = set(map(chr, byte_of)).issuperset
        texts = [b""] * len(self)
        for piece, piece_id in self._vocabulary.items():
            if is_piece(piece):
                texts[piece_id] = piece.translate(byte_of).encode("latin-1")
        for piece_id, content in self._added.items():
            texts[piece_id] = b"" if self.is_control(piece_id) else content.encode()
        return texts

    @cached_property
    def _spellings(self) -> dict[int, str]:
        return {piece_id: piece for piece, piece_id in self._vocabulary.items()} | self._added


def _characters_of_bytes() -> str:
    """The character that stands for each byte in pieces: GPT-2's table."""
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (chr(0x100 + count) for count in range(256 - len(visible)))
    return "".join(chr(byte) if byte in visible else next(hidden) for byte in range(256))
