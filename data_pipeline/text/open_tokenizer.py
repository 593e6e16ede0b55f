"""Tokenizers of either kind, from the content of their files."""

from functools import lru_cache

from data_pipeline.text.bpe_tokenizer import BpeTokenizer
from data_pipeline.text.sentencepiece_tokenizer import SentencePieceTokenizer
from data_pipeline.text.tokenizer import TOKENIZER_JSON_NAME, Tokenizer, file_name_of

_MAX_SHARED = 4


@lru_cache(maxsize=_MAX_SHARED)
def open_tokenizer(content: bytes) -> Tokenizer:
    """A tokenizer, shared by the codecs of a process. Raises TokenizerError."""
    if file_name_of(content) == TOKENIZER_JSON_NAME:
        return BpeTokenizer(content)
    return SentencePieceTokenizer(content)
