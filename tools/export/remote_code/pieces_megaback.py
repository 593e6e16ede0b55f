"""Pieces of the vocabulary of a model that writes backward, by SentencePiece.

Encodes text forward and exactly: every Python string is decoded to itself, and no text becomes a
control id, whatever it spells.
"""

import re
from functools import cached_property

import sentencepiece

BEGIN_PIECE = "<|startoftext|>"
END_PIECE = "<|endoftext|>"
# Not *.model: stock classes would load a file of that name, and read forward.
VOCABULARY_NAME = "megaback.spm"
_SPACE_SYMBOL = "\u2581"
# Characters that SentencePiece does not round-trip are encoded as byte pieces.
_SPELLED_IN_BYTES = re.compile(f"([{_SPACE_SYMBOL}\ud800-\udfff]+)")


class Pieces:
    """Vocabulary of a SentencePiece model with byte pieces and control pieces."""

    def __init__(self, path: str) -> None:
        self._processor = sentencepiece.SentencePieceProcessor(model_file=path)

    def __len__(self) -> int:
        return int(self._processor.vocab_size())

    def encode(self, text: str) -> list[int]:
        """Ids of a text in the order of the text, without markers."""
        ids: list[int] = []
        for index, part in enumerate(_SPELLED_IN_BYTES.split(text)):
            if index % 2:
                raw = part.encode("utf-8", "surrogatepass")
                ids += [self.id_of(f"<0x{value:02X}>") for value in raw]
            else:
                ids += self._processor.encode(part)
        return ids

    def id_of(self, spelling: str) -> int:
        """Id of a piece; that of unknown pieces if there is none."""
        return int(self._processor.piece_to_id(spelling))

    def spelling(self, piece_id: int) -> str:
        """Piece of an id, as the vocabulary lists it."""
        return str(self._processor.id_to_piece(piece_id))

    def is_control(self, piece_id: int) -> bool:
        """Whether an id is a marker, which no text is encoded to."""
        return bool(self._processor.is_control(piece_id))

    @cached_property
    def texts(self) -> list[bytes]:
        """UTF-8 text of each id, which may be a part of a character; b"" for control ids."""
        return [self._text(piece_id) for piece_id in range(len(self))]

    def _text(self, piece_id: int) -> bytes:
        if self._processor.is_byte(piece_id):
            return bytes([int(self.spelling(piece_id)[3:5], 16)])
        if self.is_control(piece_id) or self._processor.is_unknown(piece_id):
            return b""
        return self.spelling(piece_id).replace(_SPACE_SYMBOL, " ").encode()
