"""The layout of a `tokenizer.json`, and which settings are refused since they are not exact.

Layout: https://huggingface.co/docs/tokenizers/api/tokenizer. Byte-level BPE is supported, with any
lossless splits before the bytes.
"""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from data_pipeline.errors import TokenizerError

IMPORT = "`megaback import tokenizer FILE --out DIR/tokenizer.json`"
OTHERS = "use a byte-level BPE one, such as those of GPT-2, Llama 3 and Qwen, or train one"
_NFC = {"type": "NFC"}
NFC_NORMALIZERS = (_NFC, {"type": "Sequence", "normalizers": [_NFC]})
"""Normalizers that change no text in the usual normal form, and can be removed."""
_LOSSLESS_SPLITS = ("Split", "Digits", "Punctuation")
_UNSUPPORTED_MODEL = {
    "dropout": "merges at random (dropout)",
    "continuing_subword_prefix": "marks pieces within words",
    "end_of_word_suffix": "marks pieces at ends of words",
    "byte_fallback": "encodes unknown characters as bytes (byte_fallback) instead of all text",
}


def no_tokenizer(reason: str) -> TokenizerError:
    """The error for a file of another form."""
    return TokenizerError(
        f"this is not a tokenizer.json of the library tokenizers ({reason:.200}); {OTHERS}"
    )


def fields_of(content: bytes) -> dict[str, Any]:
    """The parsed file, with the parts that this module uses. Raises TokenizerError."""
    try:
        fields: dict[str, Any] = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise no_tokenizer(str(error)) from None
    model = fields.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("vocab"), dict | list):
        raise no_tokenizer("it has no model with a vocab")
    kind = model.get("type", "BPE" if "merges" in model else "another model")
    if kind != "BPE":
        raise TokenizerError(f"the tokenizer is {kind!r:.40}, not byte-level BPE; {OTHERS}")
    vocab, merges = model["vocab"], model.get("merges")
    added = fields.setdefault("added_tokens", [])
    is_usable = (
        isinstance(vocab, dict)
        and len(vocab) > 0
        and isinstance(merges, list)
        and all(type(piece_id) is int and piece_id >= 0 for piece_id in vocab.values())
        and isinstance(added, list)
        and all(isinstance(token, dict) for token in added)
        and all(type(token.get("id")) is int and token["id"] >= 0 for token in added)
        and all(isinstance(token.get("content"), str) for token in added)
        and all(isinstance(token.get("special"), bool) for token in added)
    )
    if not is_usable:
        raise no_tokenizer("its vocab, merges or added tokens have another form")
    return fields


def merges_of(model: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Pairs of pieces in the order of their ranks, of either notation. Raises TokenizerError."""
    for merge in model["merges"]:
        pair = merge.split(" ", 1) if isinstance(merge, str) else merge
        if not isinstance(pair, list) or len(pair) != 2 or not all(type(x) is str for x in pair):
            raise no_tokenizer("its merges have another form")
        yield pair[0], pair[1]


def characters_of_bytes() -> str:
    """The character that stands for each byte in pieces: GPT-2's table.

    >>> characters_of_bytes()[ord(" ")], characters_of_bytes()[ord("a")]
    ('\u0120', 'a')
    """
    visible = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = (chr(0x100 + count) for count in range(256 - len(visible)))
    return "".join(chr(byte) if byte in visible else next(hidden) for byte in range(256))


def split_steps(fields: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Steps that come before the BPE model, sequences flattened."""
    pending: list[Any] = [fields.get("pre_tokenizer")]
    steps = []
    while pending:
        step = pending.pop(0)
        if isinstance(step, dict) and step.get("type") == "Sequence":
            pending[:0] = step.get("pretokenizers") or []
        elif isinstance(step, dict):
            steps.append(step)
    return steps


def require_exact(fields: Mapping[str, Any]) -> None:
    """Raises TokenizerError for settings that change text, or add ids to it."""
    normalizer = fields.get("normalizer")
    if normalizer and normalizer != {"type": "Sequence", "normalizers": []}:
        kind = normalizer.get("type") if isinstance(normalizer, dict) else normalizer
        advice = f"remove it with {IMPORT}" if normalizer in NFC_NORMALIZERS else OTHERS
        raise TokenizerError(f"the tokenizer changes text (normalizer {kind!r:.40}); {advice}")
    for name in ("truncation", "padding"):
        if fields.get(name):
            raise TokenizerError(f"the tokenizer has {name} switched on; remove it with {IMPORT}")
    steps = split_steps(fields)
    for step in steps:
        kind = step.get("type")
        is_lossless = kind in _LOSSLESS_SPLITS and step.get("behavior") != "Removed"
        if kind != "ByteLevel" and not is_lossless:
            raise TokenizerError(
                f"the tokenizer's step {kind!r:.40} loses text or is not supported; {OTHERS}"
            )
    byte_level = [step for step in steps if step["type"] == "ByteLevel"]
    if len(byte_level) != 1:
        raise TokenizerError(
            f"the tokenizer has no byte-level BPE (pre_tokenizer ByteLevel); {OTHERS}"
        )
    if byte_level[0].get("add_prefix_space", True):
        raise TokenizerError(f"the tokenizer puts a space before text (add_prefix_space); {OTHERS}")
    for name, what in _UNSUPPORTED_MODEL.items():
        if fields["model"].get(name):
            raise TokenizerError(f"the tokenizer {what}; {OTHERS}")
    for token in fields["added_tokens"]:
        if not token["special"] and (token.get("lstrip") or token.get("rstrip")):
            raise TokenizerError(
                f"the added token {token['content']!r:.60} takes the spaces beside it (lstrip, "
                f"rstrip), so that text is lost; {OTHERS}"
            )
