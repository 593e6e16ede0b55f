"""Tokenizers as files: a SentencePiece model, or byte-level BPE in a tokenizer.json.

A tokenizer is its serialized bytes, identified by their SHA-256; what kind it is follows from the
content. `TextCodec` is the only user of what `Tokenizer` describes.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.common.limits import MAX_VOCABULARY
from data_pipeline.errors import TokenizerError
from data_pipeline.text.encoder import Encoder

TOKENIZER_NAME = "tokenizer.model"
"""File of a SentencePiece model."""
TOKENIZER_JSON_NAME = "tokenizer.json"
"""File of a tokenizer of the library `tokenizers`."""
TOKENIZER_NAMES = (TOKENIZER_NAME, TOKENIZER_JSON_NAME)
ANY_TOKENIZER = "|".join(map(re.escape, TOKENIZER_NAMES))
"""Regular expression of the names."""


class Tokenizer(Protocol):
    """A vocabulary, and an exact encoder of text without markers."""

    vocab_size: int
    id_dtype: np.dtype[Any]
    piece_bytes: Sequence[bytes]
    """Text of each id, which may be a part of a character; b"" for control ids."""
    byte_ids: npt.NDArray[np.unsignedinteger[Any]]
    """Id of the piece of each byte: shape (256,)."""
    unencodable: str
    """Characters, besides lone surrogates, that are spelled with byte pieces."""
    reference: Encoder
    """Encoder that defines the ids."""
    advice: str
    """Advice of errors: how to get a tokenizer that is supported."""

    @property
    def fastest(self) -> Encoder:
        """Encoder with the same ids for much text; takes a while at its first use."""

    def piece(self, piece_id: int) -> str:
        """Spelling of an id, for display."""

    def control_id(self, piece: str) -> int | None:
        """Id of a control piece, which no text can become; None if there is none."""


def file_name_of(content: bytes) -> str:
    """Name of a tokenizer's file in a data set, checkpoint or model folder.

    >>> file_name_of(b'{"version": "1.0"}')
    'tokenizer.json'
    """
    return TOKENIZER_JSON_NAME if content.startswith(b"{") else TOKENIZER_NAME


def find_tokenizer(folder: Path) -> Path:
    """The tokenizer's file in a folder, whichever kind it is; of none, the usual path."""
    found = [folder / name for name in TOKENIZER_NAMES if (folder / name).is_file()]
    return found[0] if found else folder / TOKENIZER_NAME


def dtype_of_ids(vocab_size: int, advice: str) -> np.dtype[Any]:
    """Data type of ids. Raises TokenizerError for more of them than can be read."""
    if vocab_size > MAX_VOCABULARY:
        raise TokenizerError(
            f"it has {vocab_size:,} pieces, more than the {MAX_VOCABULARY:,} that can be "
            f"read; {advice}"
        )
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")
