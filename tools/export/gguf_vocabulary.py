"""The vocabulary of a GGUF file: SentencePiece as `llama`, byte-level BPE as `gpt2`.

llama.cpp splits text for BPE by code of its own, which it finds by a name: only splits with such a
name can be exported.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.errors import TokenizerError
from data_pipeline.text.codec import TextCodec
from data_pipeline.text.tokenizer import TOKENIZER_NAME
from data_pipeline.text.tokenizer_json import fields_of, merges_of, split_steps

_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_DIGITS = "digits"
_GPT2 = "gpt2"
# (splits before the bytes, ignore_merges): llama.cpp's name, as in its convert_hf_to_gguf.py
_NAMES = {
    ((_WORDS % "",), False): "qwen2",
    ((_WORDS % "{1,3}",), True): "llama-bpe",
    ((_GPT2,), False): "gpt-2",
    ((_DIGITS, _GPT2), False): "smollm",
}


def add_vocabulary(writer: Any, codec: TextCodec) -> None:
    """Write pieces, merges and kinds. Raises TokenizerError for splits without a name."""
    if codec.file_name == TOKENIZER_NAME:
        _add_sentencepiece(writer, codec.model_bytes)
    else:
        _add_bpe(writer, codec)


def _add_sentencepiece(writer: Any, tokenizer: bytes) -> None:
    pieces = list(_pieces(tokenizer))
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list([piece for piece, _, _ in pieces])
    writer.add_token_scores([score for _, score, _ in pieces])
    writer.add_token_types([kind for _, _, kind in pieces])


def _pieces(tokenizer: bytes) -> Iterator[tuple[bytes, float, int]]:
    """Spelling, score and kind of each piece."""
    from gguf import TokenType
    from sentencepiece import SentencePieceProcessor

    processor = SentencePieceProcessor(model_proto=tokenizer)
    for piece_id in range(processor.vocab_size()):
        kind = TokenType.NORMAL
        if processor.is_unknown(piece_id):
            kind = TokenType.UNKNOWN
        elif processor.is_control(piece_id):
            kind = TokenType.CONTROL
        elif processor.is_byte(piece_id):
            kind = TokenType.BYTE
        spelling = processor.id_to_piece(piece_id).encode()
        yield spelling, processor.get_score(piece_id), int(kind)


def _add_bpe(writer: Any, codec: TextCodec) -> None:
    from gguf import TokenType

    fields = fields_of(codec.model_bytes)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(llama_cpp_splits(fields))
    kinds = [TokenType.UNUSED] * codec.vocab_size
    for piece_id in fields["model"]["vocab"].values():
        kinds[piece_id] = TokenType.NORMAL
    for token in fields["added_tokens"]:
        kinds[token["id"]] = TokenType.CONTROL if token["special"] else TokenType.USER_DEFINED
    writer.add_token_list([codec.piece(piece_id) for piece_id in range(codec.vocab_size)])
    writer.add_token_types(list(map(int, kinds)))
    writer.add_token_merges([" ".join(pair) for pair in merges_of(fields["model"])])


def markers_of(codec: TextCodec) -> list[str]:
    """Control pieces, which llama.cpp reads in any text that spells them."""
    if codec.file_name != TOKENIZER_NAME:
        added = fields_of(codec.model_bytes)["added_tokens"]
        return [str(token["content"]) for token in added if token["special"]]
    without_text = [i for i, size in enumerate(codec.piece_num_bytes()) if not size]
    return [codec.piece(piece_id) for piece_id in without_text]


def llama_cpp_splits(fields: Mapping[str, Any]) -> str:
    """llama.cpp's name of the splits of a tokenizer.json. Raises TokenizerError without one."""
    steps = tuple(filter(None, map(_step, split_steps(fields))))
    ignores_merges = bool(fields["model"].get("ignore_merges"))
    name = _NAMES.get((steps, ignores_merges))
    if name is None:
        raise TokenizerError(
            f"llama.cpp has no name for the tokenizer's splits ({' '.join(steps):.200}); use "
            "--to full or --to hf"
        )
    return name


def _step(step: Mapping[str, Any]) -> str | None:
    """A split in the notation of `_NAMES`; None for bytes that are not split further."""
    if step["type"] == "ByteLevel":
        return _GPT2 if step.get("use_regex", True) else None
    if step["type"] == "Digits" and step.get("individual_digits"):
        return _DIGITS
    expression = step.get("pattern", {}).get("Regex")
    if expression and step["behavior"] == "Isolated" and not step.get("invert"):
        return str(expression)
    return json.dumps(step)
