"""Tokenization with exactly SentencePiece's ids, several times as fast.

`fastest_encoder` returns the first of three encoders that is exact for a model: kitoken by distinct
words, kitoken alone, and SentencePiece, the reference. Exactness is derived from the vocabulary and
checked against the reference. Callers handle lone surrogates and U+2581.
"""

import random
import re
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from data_pipeline.common.packages import is_installed

Ids = npt.NDArray[np.unsignedinteger[Any]]

_SPACE_SYMBOL = "\u2581"
_LONG_OR_LAST_SPACES = re.compile(r"( {2,}| \Z)")
_WORD_THEN_SPACE = re.compile("[^ ] ")
_SPACE_THEN_WORD = re.compile(" [^ ]")

# Encoding a batch takes about 100 MB. Larger ones repeat more words, but miss the caches.
BATCH_CHARACTERS = 1 << 23
_CHUNK_CHARACTERS = 1 << 20
# Limits beyond which numbering words takes longer than it saves: little text, short texts, many
# distinct words, and frequent runs of spaces, each of which is handled in Python.
_MIN_CHARACTERS = 1 << 16
_CHARACTERS_PER_TEXT = 256
_SAMPLE_CHARACTERS = 1 << 17
_MAX_DISTINCT_IN_SAMPLE = 0.6
_MAX_DISTINCT = 0.33
_CHARACTERS_PER_RUN = 64

_JOINED_PIECES = 4096
_MAX_COMPARED_PIECES = (1 << 18) + 8
"""Size of the largest vocabularies in use; a million pieces took 8 s and 1.5 GiB."""
PROBES = (
    "",
    *(
        space * count + end
        for space in (" ", "\t", "\n", "\r\n")
        for count in (1, 2, 3, 5, 8, 17, 70)
        for end in ("", "a", " a  ")
    ),
    "  a  \ufb01 \uff21\t\n e\u0301 \u00a0b ",
    "line\nline\r\n\tindented\n\n    more  \n",
    "".join(map(chr, range(0x250))),
    " ".join(map(chr, range(0x250))),
    "<unk><s></s><pad> <0x41><0x0A> \u2047  \u2047 <|im_end|>the<|endoftext|> x<|im_start|>y",
    "1999 3.14159 1,000,000 0x7f 12345678901234567890",
    "a" * 191 + " " + "ab" * 96 + " " + "abc" * 65 + "\u00e9" * 200 + "x" * 1000,  # long words
    "\U0001f468\u200d\U0001f469 \U0001f1fa\U0001f1f3 \u2708\ufe0f\U0001f44d\U0001f3fd",
    "\u8fd9\u662f\u4e00\u4e2a\u53e5\u5b50\u3002\u65e5\u672c\u8a9e\u306e \ud55c\uad6d\uc5b4",
    "e\u0301a\u0308\u0323 \u0ba3\u0b95\u0bcd\u0b95\u0bae\u0bcd \u0e2a\u0e27\u0e31\u0e2a\u0e14",
    "\u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627 \u202eabc\u202c \u200f",
    "\x00 a\x00b \ufeff\ufffd \ufffe\uffff \ue000\U0010ffff \u0378 \u2585 \u2028\u2029\x85\u3000",
    "\u201cCurly,\u201d \u2018quotes\u2019 \u2014 dashes\u2013\u2026 caf\u00e9 na\u00efve",
)


class Encoder(Protocol):
    """Encoder with exactly the ids of the tokenizer's library, in the text's order."""

    @property
    def name(self) -> str:
        """Name for display and reports."""

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text, read-only, without the characters that its caller handles."""


class SentencePieceEncoder:
    """The reference encoder."""

    name = "sentencepiece"

    def __init__(self, processor: Any, id_dtype: np.dtype[Any]) -> None:
        self._processor = processor
        self._id_dtype = id_dtype

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        return [np.array(self._processor.encode(text), dtype=self._id_dtype) for text in texts]


class KitokenEncoder:
    """kitoken, for models for which it is exact."""

    name = "kitoken"

    def __init__(self, kitoken: Any, id_dtype: np.dtype[Any]) -> None:
        self._kitoken = kitoken
        self._id_dtype = id_dtype

    def encode(self, text: str) -> Ids:
        return np.array(self._kitoken.encode(text), dtype=self._id_dtype)

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        return [self.encode(text) for text in texts]


class WordEncoder:
    """kitoken on the distinct words of a batch.

    A segment is a run of spaces and the word after it. If no piece crosses segments, the ids of a
    text are those of its segments. Nearly all segments are one space and a common word: Arrow
    numbers the distinct ones of a batch, kitoken encodes those, and Arrow joins the ids. Nothing is
    cached across batches, so memory does not grow with the input.
    """

    name = "kitoken by distinct words"

    def __init__(
        self,
        encoder: KitokenEncoder,
        piece_texts: Sequence[str],
        id_dtype: np.dtype[Any],
        *,
        always_by_words: bool = False,
    ) -> None:
        """No piece may contain a space after another character, and one piece must be a space."""
        self._encoder = encoder
        self._always_by_words = always_by_words
        self._piece_texts = piece_texts
        self._id_dtype = id_dtype
        self._opens_segment = np.array([text.startswith(" ") for text in piece_texts])

    def encode_all(self, texts: Sequence[str]) -> list[Ids]:
        min_characters = max(_MIN_CHARACTERS, _CHARACTERS_PER_TEXT * len(texts))
        if sum(map(len, texts)) < min_characters and not self._always_by_words:
            return self._encoder.encode_all(texts)
        stretches = [
            [stretch for chunk in self._chunks(text) for stretch in _stretches(chunk)]
            for text in texts
        ]
        ids_of_tails = self._encode_tails(
            [tail for of_text in stretches for _, tail in of_text if tail is not None]
        )
        return [np.concatenate(list(self._join(of_text, ids_of_tails))) for of_text in stretches]

    def _join(
        self, stretches: Sequence[tuple[str, str | None]], ids_of_tails: Iterator[Ids]
    ) -> Iterator[Ids]:
        for head, tail in stretches:
            yield self._encoder.encode(head)
            if tail is not None:
                yield next(ids_of_tails)

    def _encode_tails(self, tails: Sequence[str]) -> Iterator[Ids]:
        """Ids of each tail, with the space before it."""
        for batch in in_batches(tails):
            sample = next(in_batches(batch, _SAMPLE_CHARACTERS))
            if not self._pays(_numbered_words(sample)[1], _MAX_DISTINCT_IN_SAMPLE):
                yield from self._encode_directly(batch)
                continue
            bounds, words = _numbered_words(batch)
            if self._pays(words, _MAX_DISTINCT):
                yield from self._encode_by_words(bounds, words)
            else:
                yield from self._encode_directly(batch)

    def _pays(self, words: Any, max_distinct: float) -> bool:
        if self._always_by_words:
            return len(words) > 0
        return len(words.dictionary) < len(words) * max_distinct

    def _encode_directly(self, tails: Sequence[str]) -> list[Ids]:
        return [self._encoder.encode(f" {tail}") for tail in tails]

    def _encode_by_words(self, bounds: npt.NDArray[np.int32], words: Any) -> Iterator[Ids]:
        import pyarrow as pa

        distinct = words.dictionary
        ids = self._encoder.encode("".join([f" {word}" for word in distinct.to_pylist()]))
        starts = np.flatnonzero(self._opens_segment[ids])
        assert len(starts) == len(distinct)
        offsets = np.append(starts, len(ids)).astype(np.int64) * self._id_dtype.itemsize
        table = pa.Array.from_buffers(
            pa.large_binary(), len(distinct), [None, pa.py_buffer(offsets), pa.py_buffer(ids)]
        )
        _, offsets, raw = table.take(words.indices).buffers()
        stops = np.frombuffer(offsets, np.int64)[bounds] // self._id_dtype.itemsize
        every_id = np.frombuffer(raw, self._id_dtype)
        for start, stop in pairwise(stops.tolist()):
            yield every_id[start:stop]

    def _chunks(self, text: str) -> Iterator[str]:
        """Cut a long text between pieces: kitoken's list takes 40 bytes per token."""
        start = 0
        while len(text) - start > _CHUNK_CHARACTERS:
            stop = start + _CHUNK_CHARACTERS
            while stop < len(text) and text[stop - 1 : stop + 1] in self._pairs_in_pieces:
                stop += 1
            yield text[start:stop]
            start = stop
        yield text[start:]

    @cached_property
    def _pairs_in_pieces(self) -> set[str]:
        return {left + right for text in self._piece_texts for left, right in pairwise(text)}


def in_batches(texts: Iterable[str], max_characters: int = BATCH_CHARACTERS) -> Iterator[list[str]]:
    """Group texts in order; a batch ends with the text that fills it."""
    batch: list[str] = []
    num_characters = 0
    for text in texts:
        batch.append(text)
        num_characters += len(text) + _CHARACTERS_PER_TEXT
        if num_characters >= max_characters:
            yield batch
            batch, num_characters = [], 0
    if batch:
        yield batch


def _stretches(text: str) -> Iterator[tuple[str, str | None]]:
    """Split a text into stretches: a head, then words with exactly one space before each.

    The text is the concatenation of `head + " " + tail`, or of `head` where there is no tail.
    """
    if "  " not in text and not text.endswith(" "):
        first, rest = text, []
    elif text.count("  ") > len(text) // _CHARACTERS_PER_RUN:
        yield text, None
        return
    else:
        first, *rest = _LONG_OR_LAST_SPACES.split(text)
    for spaces, part in zip(["", *rest[::2]], [first, *rest[1::2]], strict=True):
        head, space, tail = part.partition(" ")
        yield spaces + head, tail if space else None


def _numbered_words(tails: Sequence[str]) -> tuple[npt.NDArray[np.int32], Any]:
    """Bounds of each tail's words, shape (tails + 1,), and the words as a DictionaryArray."""
    import pyarrow as pa
    import pyarrow.compute as pc

    # Through plain buffers: `pa.array` and `to_numpy` would import pandas, if it is installed.
    utf8 = [tail.encode() for tail in tails]
    offsets = np.zeros(len(utf8) + 1, dtype=np.int64)
    np.cumsum([len(tail) for tail in utf8], out=offsets[1:])
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(utf8))]
    array = pa.Array.from_buffers(pa.large_string(), len(utf8), buffers)
    words = pc.split_pattern(array, " ")
    bounds = np.frombuffer(words.offsets.buffers()[1], dtype=np.int32)[: len(words) + 1]
    return bounds, words.flatten().dictionary_encode()


def fastest_encoder(model_bytes: bytes, processor: Any, id_dtype: np.dtype[Any]) -> Encoder:
    """The fastest encoder with the same ids as `processor`, SentencePiece with this model.

    Takes about 80 ms with 8,888 pieces, most of it for the comparison. Beyond
    `_MAX_COMPARED_PIECES` it is SentencePiece itself.
    """
    reference = SentencePieceEncoder(processor, id_dtype)
    if processor.vocab_size() > _MAX_COMPARED_PIECES:
        return reference
    kitoken = kitoken_of("from_sentencepiece", model_bytes)
    texts = _piece_texts(processor)
    if kitoken is None or not _is_exact_by_construction(kitoken, processor, texts):
        return reference
    alone = KitokenEncoder(kitoken, id_dtype)
    # kitoken encodes a segment that is a piece as that piece; SentencePiece may not.
    as_segments = [text for text in texts if text]
    probes = [*PROBES, *_joined(as_segments)]
    expected = processor.encode([*as_segments, *probes], num_threads=1)
    if not gives(alone, [*as_segments, *probes], expected):
        return reference
    if any(map(_WORD_THEN_SPACE.search, texts)) or " " not in texts or not is_installed("pyarrow"):
        return alone
    by_words = WordEncoder(alone, texts, id_dtype, always_by_words=True)
    if not gives(by_words, probes, expected[len(as_segments) :]):
        return alone
    return WordEncoder(alone, texts, id_dtype)


def _import_kitoken() -> Any:
    try:
        import kitoken
    except ImportError:
        return None
    return kitoken


# Not lazily: first imported in a thread that ends, it breaks every later use.
_KITOKEN = _import_kitoken()


def kitoken_of(loader: str, content: bytes) -> Any:
    """kitoken with a tokenizer, or None if it is not installed or rejects the tokenizer."""
    if _KITOKEN is None:
        return None
    try:
        return getattr(_KITOKEN.Kitoken, loader)(content)
    except (RuntimeError, ValueError):
        return None


def _piece_texts(processor: Any) -> list[str]:
    """Text of each piece, by id; "" for byte, control and unknown pieces."""
    ids = list(range(processor.vocab_size()))
    has_no_text = zip(
        processor.is_control(ids), processor.is_unknown(ids), processor.is_byte(ids), strict=True
    )
    return [
        "" if any(flags) else piece.replace(_SPACE_SYMBOL, " ")
        for piece, flags in zip(processor.id_to_piece(ids), has_no_text, strict=True)
    ]


def _is_exact_by_construction(kitoken: Any, processor: Any, texts: Sequence[str]) -> bool:
    """Whether kitoken implements every feature of the model exactly as SentencePiece does.

    True for BPE without normalization and without user-defined pieces, where merges have distinct
    ranks, every character of a piece is a piece, and no piece crosses kitoken's splits.
    """
    definition = kitoken.definition()
    try:
        is_bpe = definition["model"]["BytePair"]["chars"] is True
        config = definition["config"]
        (replacement,) = (step["Replace"]["replacement"] for step in config["normalization"])
        (behavior,) = (cut["Pattern"]["behavior"] for cut in config["split"])
        kinds = {special["kind"] for special in definition["specials"]}
    except (KeyError, TypeError, ValueError):
        return False  # another step, or another version of kitoken
    crosses_a_cut = {"MergeRight": _WORD_THEN_SPACE, "MergeLeft": _SPACE_THEN_WORD}.get(behavior)
    ids = [piece_id for piece_id, text in enumerate(texts) if len(text) > 1]
    scores = processor.get_score(ids)
    pieces = set(texts)
    return (
        is_bpe
        and replacement == _SPACE_SYMBOL
        and kinds <= {"Control", "Unknown"}
        and not any(processor.is_unused(list(range(len(texts)))))
        and len(set(scores)) == len(scores)
        and set("".join(texts)) <= pieces
        and crosses_a_cut is not None
        and not any(map(crosses_a_cut.search, texts))
    )


def _joined(pieces: Sequence[str]) -> Iterator[str]:
    """Texts that join pieces, within words and as separate words."""
    generator = random.Random(0)
    some = generator.sample(pieces, min(len(pieces), _JOINED_PIECES))
    yield "".join(some)
    yield " ".join(some)


def gives(encoder: Encoder, texts: Sequence[str], expected: Sequence[list[int]]) -> bool:
    """Whether an encoder has these ids for these texts."""
    try:
        return [ids.tolist() for ids in encoder.encode_all(texts)] == expected
    except OverflowError:  # an id outside the vocabulary
        return False
