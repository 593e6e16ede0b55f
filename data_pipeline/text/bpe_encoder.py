"""Byte-level BPE with exactly the ids of `tokenizers`, several times as fast.

`fastest_bpe_encoder` returns kitoken where it has the same regular expressions, no normalization
and the same ids for a set of hard texts that has each character of the basic plane; texts with
other characters are encoded by the reference. Callers handle lone surrogates.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from itertools import compress
from typing import Any

import numpy as np

from data_pipeline.text.encoder import PROBES, Encoder, Ids, KitokenEncoder, gives, kitoken_of
from data_pipeline.text.tokenizer_json import split_steps

_BASIC_PLANE = 0x10000
_CHARACTERS_PER_PROBE = 512


class BpeEncoder:
    """The reference encoder."""

    name = "tokenizers"

    def __init__(self, tokenizer: Any, id_dtype: np.dtype[Any]) -> None:
        self._tokenizer = tokenizer
        self._id_dtype = id_dtype

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        # One by one: a batch would start threads, which processes must not fork with.
        encode = self._tokenizer.encode
        return [
            np.array(encode(text, add_special_tokens=False).ids, dtype=self._id_dtype)
            for text in texts
        ]


class BasicPlaneEncoder:
    """kitoken for texts within the basic plane that spell no added token, else the reference."""

    name = "kitoken"

    def __init__(self, fast: Encoder, reference: Encoder, added: Sequence[str]) -> None:
        self._fast = fast
        self._reference = reference
        self._added = added

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        are_basic = list(map(self._is_basic, texts))
        basic = iter(self._fast.encode_all(list(compress(texts, are_basic))))
        others = iter(
            self._reference.encode_all(list(compress(texts, [not basic for basic in are_basic])))
        )
        return [next(basic if is_basic else others) for is_basic in are_basic]

    def _is_basic(self, text: str) -> bool:
        in_plane = text.isascii() or len(text.encode("utf-16-le")) == 2 * len(text)
        return in_plane and not any(content in text for content in self._added)


def fastest_bpe_encoder(
    fields: Mapping[str, Any],
    piece_bytes: Sequence[bytes],
    reference: Encoder,
    id_dtype: np.dtype[Any],
) -> Encoder:
    """The fastest encoder with the ids of `reference`, that of a parsed tokenizer.json."""
    added = [token["content"] for token in fields["added_tokens"] if not token["special"]]
    bare = {**fields, "added_tokens": [], "post_processor": None}
    kitoken = kitoken_of("from_tokenizers", json.dumps(bare).encode())
    if kitoken is None or not _splits_alike(kitoken, fields):
        return reference
    fast = KitokenEncoder(kitoken, id_dtype)
    # kitoken encodes a segment that is a piece as that piece; merges may not make it.
    probes = [*PROBES, *_basic_plane(), *_whole_texts(piece_bytes)]
    chosen = BasicPlaneEncoder(fast, reference, added)
    if not gives(chosen, probes, [ids.tolist() for ids in reference.encode_all(probes)]):
        return reference
    return chosen


def _splits_alike(kitoken: Any, fields: Mapping[str, Any]) -> bool:
    """Whether kitoken has the regular expressions of the file, isolated, and nothing else."""
    *splits, last = split_steps(fields)
    expressions = [step.get("pattern", {}).get("Regex") for step in splits]
    if last != {**last, "type": "ByteLevel", "use_regex": False} or None in expressions:
        return False
    if any(step["behavior"] != "Isolated" or step.get("invert") for step in splits):
        return False
    definition = kitoken.definition()
    try:
        config = definition["config"]
        cuts = [cut["Pattern"] for cut in config["split"]]
        found = [(cut["pattern"]["Regex"], cut["behavior"]) for cut in cuts]
        changes = [*config["normalization"], *config["processing"]]
    except (KeyError, TypeError):
        return False  # another step, or another version of kitoken
    return found == [(expression, "Isolate") for expression in expressions] and not changes


def _whole_texts(piece_bytes: Sequence[bytes]) -> Iterator[str]:
    """Texts of the pieces that are not parts of characters."""
    for piece in piece_bytes:
        try:
            yield piece.decode()
        except UnicodeDecodeError:
            continue


def _basic_plane() -> list[str]:
    """Each character beside letters, spaces, digits and marks."""
    characters = [chr(code) for code in range(_BASIC_PLANE) if not 0xD800 <= code < 0xE000]
    texts = [f"a{character}a {character}1\n" for character in characters]
    starts = range(0, len(texts), _CHARACTERS_PER_PROBE)
    return ["".join(texts[start : start + _CHARACTERS_PER_PROBE]) for start in starts]
