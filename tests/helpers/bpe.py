"""Byte-level BPE tokenizers in the layout of Qwen's tokenizer.json, trained on a novel."""

import bz2
import json
from functools import cache
from pathlib import Path
from typing import Any

import data_pipeline

_NOVELS = Path(data_pipeline.__file__).parent / "sources" / "novels"
_EXPRESSION = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|box_start|>")
_TEXT_TOKENS = ("<tool_call>", "<think>", "</think>")
NUM_MERGED = 700
NUM_IDS = NUM_MERGED + len(_SPECIAL) + len(_TEXT_TOKENS)


@cache
def _trained() -> str:
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(_EXPRESSION), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=NUM_MERGED, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    lines = bz2.decompress((_NOVELS / "persuasion.jsonl.bz2").read_bytes()).splitlines()
    tokenizer.train_from_iterator([json.loads(line)["text"] for line in lines[:6]], trainer)
    text: str = tokenizer.to_str()
    return text


def qwen_fields() -> dict[str, Any]:
    """A tokenizer.json as Qwen publishes: NFC, special tokens, and tokens that text may spell."""
    fields: dict[str, Any] = json.loads(_trained())
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    fields["added_tokens"] = [
        {"id": NUM_MERGED + index, "content": content, **flags, "special": content in _SPECIAL}
        for index, content in enumerate((*_SPECIAL, *_TEXT_TOKENS))
    ]
    return fields


def qwen_content(**changes: Any) -> bytes:
    """Content of the file, with some of its fields changed."""
    return json.dumps({**qwen_fields(), **changes}, indent=2).encode()
