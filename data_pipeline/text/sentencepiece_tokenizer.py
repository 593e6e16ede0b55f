"""SentencePiece models as tokenizers."""

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np

from data_pipeline.errors import TokenizerError
from data_pipeline.text.encoder import Encoder, SentencePieceEncoder, fastest_encoder
from data_pipeline.text.tokenizer import dtype_of_ids

_SPACE_SYMBOL = "\u2581"


def _no_model(reason: str = "") -> TokenizerError:
    return TokenizerError(
        f"this is not a SentencePiece model{reason}; train one with `megaback tokenizer train`"
    )


class SentencePieceTokenizer:
    """A SentencePiece model with a piece for each byte."""

    # It represents a space as U+2581, so a real U+2581 would be decoded as a space.
    unencodable = _SPACE_SYMBOL
    advice = "train one with `megaback tokenizer train`"

    def __init__(self, content: bytes) -> None:
        """Raises TokenizerError when the bytes are not a model that megaback can use."""
        import sentencepiece

        self._content = content
        try:
            self._processor = sentencepiece.SentencePieceProcessor()
            self._processor.LoadFromSerializedProto(content)
        except (RuntimeError, UnicodeDecodeError):
            raise _no_model() from None
        self.vocab_size: int = self._processor.vocab_size()
        self.id_dtype = dtype_of_ids(
            self.vocab_size, "train a smaller one with `megaback tokenizer train`"
        )
        self.reference: Encoder = SentencePieceEncoder(self._processor, self.id_dtype)
        self.byte_ids = np.array(
            [self._require_byte(value) for value in range(256)], dtype=self.id_dtype
        )
        try:
            self.piece_bytes: Sequence[bytes] = [
                self._bytes_of(piece_id) for piece_id in range(self.vocab_size)
            ]
        except (ValueError, IndexError) as error:  # pieces that are not UTF-8, or not like <0x0A>
            raise _no_model(f" ({error})") from None

    @cached_property
    def fastest(self) -> Encoder:
        return fastest_encoder(self._content, self._processor, self.id_dtype)

    def piece(self, piece_id: int) -> str:
        spelling: str = self._processor.id_to_piece(piece_id)
        return spelling

    def control_id(self, piece: str) -> int | None:
        piece_id: int = self._processor.piece_to_id(piece)
        is_it = self._processor.id_to_piece(piece_id) == piece
        return piece_id if is_it and self._processor.is_control(piece_id) else None

    def _require_byte(self, value: int) -> int:
        piece_id: int = self._processor.piece_to_id(f"<0x{value:02X}>")
        if not self._processor.is_byte(piece_id):
            raise TokenizerError(
                f"the tokenizer lacks the byte piece <0x{value:02X}>; "
                "train one with byte fallback (`megaback tokenizer train` does)"
            )
        return piece_id

    def _bytes_of(self, piece_id: int) -> bytes:
        processor: Any = self._processor
        if processor.is_byte(piece_id):
            return bytes([int(processor.id_to_piece(piece_id)[3:5], 16)])
        if processor.is_control(piece_id) or processor.is_unknown(piece_id):
            return b""
        piece: str = processor.id_to_piece(piece_id)
        return piece.replace(_SPACE_SYMBOL, " ").encode()
