"""Fast encoders return SentencePiece's ids, or are not used."""

import io
import pickle
import random
from collections.abc import Callable, Iterator
from functools import cache

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from data_pipeline.text import codec as text
from data_pipeline.text import encoder
from data_pipeline.text.codec import BEGIN_PIECE, CHAT_PIECES, END_PIECE, Direction, TextCodec, Unit
from data_pipeline.text.encoder import (
    Encoder,
    KitokenEncoder,
    SentencePieceEncoder,
    WordEncoder,
    fastest_encoder,
    in_batches,
)
from tests.helpers.paths import SHARED

MARKERS = (BEGIN_PIECE, END_PIECE, *CHAT_PIECES)
PROSE = SHARED / "corpora" / "prose"
ID_DTYPE = np.dtype("<u2")

ENGLISH = [
    "The old captain remembered 3 white horses, in the autumn of 1931; nobody else would.",
    "He said: \u201cI don\u2019t know\u201d \u2014 and  forgot the letter.\nThe end.\n",
]
CODE = [
    "def encode(self, text):\n    if not text:\n        return []\n\treturn [1, 2,  3]\r\n",
    "for (int i = 0; i < 10; i++) {\n    total += values[i];    // a sum\n}\n\n",
]
CHINESE = [
    "\u8fd9\u662f\u4e00\u4e2a\u53e5\u5b50\u3002\u6211\u4eec\u5728\u8fd9\u91cc\u5b66\u4e60\u3002",
    "\u6211\u4eec \u662f\u5b66\u751f\uff0c\u4ed6\u4eec\u4e5f\u662f\u5b66\u751f\u3002 abc 123",
]
MARKUP = [
    "the cat x<|im_end|>y sat|>z on<|im_start|>user|>assi<pad>ding <0x41>B<unk>known <s>trong",
    "a \u2047 b <|end of|> \u2047\u2047 <0x0A>the</s>the <<|>|>",
]
TEXTS_OF = {"english": ENGLISH, "code": CODE, "chinese": CHINESE, "markup": MARKUP}


def train(sentences: list[str], **changed: object) -> bytes:
    """The largest model that the sentences allow, with some settings changed."""
    generator = random.Random(0)
    words = [word for sentence in sentences for word in sentence.split(" ")]
    varied = [" ".join(generator.choices(words, k=9)) for _ in range(200)]
    model = io.BytesIO()
    arguments = {
        "sentence_iterator": iter([*sentences * 40, *varied]),
        "model_writer": model,
        "model_type": "bpe",
        "vocab_size": 600,
        "hard_vocab_limit": False,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "allow_whitespace_only_pieces": True,
        "bos_piece": BEGIN_PIECE,
        "eos_piece": END_PIECE,
        "control_symbols": list(CHAT_PIECES),
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(**arguments | changed)
    return model.getvalue()


@cache
def model_of(name: str) -> bytes:
    return train(TEXTS_OF[name])


@cache
def processor_of(model_bytes: bytes) -> sentencepiece.SentencePieceProcessor:
    return sentencepiece.SentencePieceProcessor(model_proto=model_bytes)


@cache
def chosen_for(model_bytes: bytes) -> Encoder:
    return fastest_encoder(model_bytes, processor_of(model_bytes), ID_DTYPE)


@cache
def always_by_words(model_bytes: bytes) -> WordEncoder:
    """The chosen encoder, forced to encode by words."""
    chosen = chosen_for(model_bytes)
    assert isinstance(chosen, WordEncoder)
    return WordEncoder(chosen._encoder, chosen._piece_texts, ID_DTYPE, always_by_words=True)


def reference_ids(model_bytes: bytes, texts: list[str]) -> list[list[int]]:
    ids: list[list[int]] = processor_of(model_bytes).encode(texts)
    return ids


def ids_by(chosen: Encoder, texts: list[str]) -> list[list[int]]:
    return [ids.tolist() for ids in chosen.encode_all(texts)]


CHARACTERS = st.characters(exclude_categories=("Cs",), exclude_characters="\u2581")
HARD_PARTS = st.sampled_from(
    [
        *MARKERS,
        *(" " * count for count in (1, 1, 1, 1, 2, 3, 8)),
        *("\n", "\n\n", "\r\n", "\t", "\x00", "\ufeff", "\u2585", "\u2047", " \u2047 "),
        *("<0x41>", "<0x0A>", "<unk>", "<s>", "</s>", "<pad>", "e\u0301", "1999", "a" * 200),
        *("\U0001f468\u200d\U0001f469", "\u05e9\u05dc\u05d5\u05dd", "\u200f", "\ue000", "\u0378"),
    ]
)


def texts_near(model_bytes: bytes) -> st.SearchStrategy[list[str]]:
    """Lists of texts of pieces, hard parts and any characters, with and without spaces."""
    processor = processor_of(model_bytes)
    pieces = [
        processor.id_to_piece(index).replace("\u2581", " ")
        for index in range(processor.vocab_size())
        if not processor.is_control(index) and not processor.is_byte(index)
    ]
    parts = st.one_of(st.sampled_from(pieces), HARD_PARTS, st.text(CHARACTERS, max_size=4))
    text = st.one_of(
        st.text(CHARACTERS, max_size=40),
        st.lists(parts, max_size=30).map("".join),
        st.lists(parts, max_size=30).map(" ".join),
        st.lists(st.sampled_from(pieces), max_size=60).map("".join),
    )
    return st.lists(text, max_size=4)


@pytest.mark.parametrize("name", TEXTS_OF)
@settings(max_examples=150)
@given(data=st.data())
def test_ids_by_words_equal_sentencepieces(name: str, data: st.DataObject) -> None:
    model_bytes = model_of(name)
    texts = data.draw(texts_near(model_bytes))
    assert ids_by(always_by_words(model_bytes), texts) == reference_ids(model_bytes, texts)


@pytest.mark.parametrize("name", TEXTS_OF)
@settings(max_examples=150)
@given(data=st.data())
def test_kitokens_ids_equal_sentencepieces(name: str, data: st.DataObject) -> None:
    model_bytes = model_of(name)
    texts = data.draw(texts_near(model_bytes))
    alone = always_by_words(model_bytes)._encoder
    assert ids_by(alone, texts) == reference_ids(model_bytes, texts)


@settings(max_examples=150)
@given(data=st.data(), chunk=st.integers(1, 9), batch=st.integers(1, 30))
def test_chunking_long_texts_does_not_change_ids(
    data: st.DataObject, chunk: int, batch: int
) -> None:
    model_bytes = model_of("code")
    texts = data.draw(texts_near(model_bytes))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_CHUNK_CHARACTERS", chunk)
        patch.setattr(encoder, "_SAMPLE_CHARACTERS", batch)
        patch.setattr(encoder, "in_batches", lambda texts, size=batch: in_batches(texts, size))
        assert ids_by(always_by_words(model_bytes), texts) == reference_ids(model_bytes, texts)


@given(words=st.lists(st.text(CHARACTERS, min_size=1, max_size=5), max_size=30))
@pytest.mark.parametrize("max_distinct", [0.0, 0.5, 1.1])
def test_the_share_of_distinct_words_does_not_change_ids(
    words: list[str], max_distinct: float
) -> None:
    model_bytes = model_of("english")
    texts = [" ".join([*words, *words]), " ".join(words)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encoder, "_MIN_CHARACTERS", 0)
        patch.setattr(encoder, "_MAX_DISTINCT", max_distinct)
        patch.setattr(encoder, "_MAX_DISTINCT_IN_SAMPLE", 1.1)
        assert ids_by(chosen_for(model_bytes), texts) == reference_ids(model_bytes, texts)


@pytest.mark.parametrize("name", ["english", "chinese"])
def test_ids_of_every_character_equal_sentencepieces(name: str) -> None:
    characters = [
        chr(code) for code in range(0x110000) if code != 0x2581 and not 0xD800 <= code < 0xE000
    ]
    texts = ["".join(characters), " ".join(characters)]
    model_bytes = model_of(name)
    assert ids_by(always_by_words(model_bytes), texts) == reference_ids(model_bytes, texts)


@pytest.mark.parametrize("characters", ["a", "ab", "the ", " ", "\u00e9", "\n", "\u6211\u4eec"])
@pytest.mark.parametrize("count", [95, 96, 97, 191, 192, 193, 1000, 20_000])
def test_ids_of_long_runs_equal_sentencepieces(characters: str, count: int) -> None:
    for name in TEXTS_OF:
        texts = [characters * count]
        assert ids_by(always_by_words(model_of(name)), texts) == reference_ids(
            model_of(name), texts
        )


@pytest.fixture(scope="module")
def prose() -> list[str]:
    if not PROSE.is_dir():
        pytest.skip(f"no real prose in {PROSE}")
    import pyarrow.parquet as pq

    table = pq.read_table(PROSE / "train-00000.parquet", columns=["text"])
    return [str(text) for text in table["text"].to_pylist()[:600]]


@pytest.mark.parametrize("name", TEXTS_OF)
def test_ids_of_real_prose_equal_sentencepieces(name: str, prose: list[str]) -> None:
    model_bytes = model_of(name)
    assert ids_by(chosen_for(model_bytes), prose) == reference_ids(model_bytes, prose)


def test_ids_of_real_prose_with_its_own_model_equal_sentencepieces(prose: list[str]) -> None:
    model_bytes = train(prose[::2], vocab_size=4000)
    assert ids_by(chosen_for(model_bytes), prose) == reference_ids(model_bytes, prose)


@pytest.mark.parametrize("name", TEXTS_OF)
def test_a_trained_model_is_encoded_by_words(name: str) -> None:
    assert isinstance(chosen_for(model_of(name)), WordEncoder)


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"split_by_whitespace": False}, SentencePieceEncoder),
        ({"treat_whitespace_as_suffix": True}, KitokenEncoder),
        ({"user_defined_symbols": ["captain", "x y", "\n"]}, SentencePieceEncoder),
        ({"user_defined_symbols": ["c"]}, SentencePieceEncoder),
        ({"model_type": "unigram"}, SentencePieceEncoder),
        ({"model_type": "char"}, SentencePieceEncoder),
        ({"normalization_rule_name": "nfkc"}, SentencePieceEncoder),
        ({"add_dummy_prefix": True}, SentencePieceEncoder),
        ({"remove_extra_whitespaces": True}, SentencePieceEncoder),
    ],
    ids=str,
)
@settings(max_examples=30)
@given(data=st.data())
def test_other_kinds_of_models_are_encoded_exactly(
    changed: dict[str, object], expected: type, data: st.DataObject
) -> None:
    model_bytes = _model_with(repr(changed))
    texts = data.draw(texts_near(model_bytes))
    chosen = chosen_for(model_bytes)
    assert isinstance(chosen, expected)
    assert ids_by(chosen, texts) == reference_ids(model_bytes, texts)


@cache
def _model_with(changed: str) -> bytes:
    import ast

    return train([*ENGLISH, *CODE], **ast.literal_eval(changed))


def test_without_pyarrow_ids_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "is_installed", lambda name: name != "pyarrow")
    model_bytes = model_of("english")
    chosen = fastest_encoder(model_bytes, processor_of(model_bytes), ID_DTYPE)
    assert isinstance(chosen, KitokenEncoder)
    assert ids_by(chosen, ENGLISH) == reference_ids(model_bytes, ENGLISH)


def test_without_kitoken_sentencepiece_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoder, "_KITOKEN", None)
    model_bytes = model_of("english")
    chosen = fastest_encoder(model_bytes, processor_of(model_bytes), ID_DTYPE)
    assert chosen.name == "sentencepiece"


class _Wrong:
    """kitoken with wrong ids for one word."""

    def __init__(self, kitoken: object) -> None:
        self._kitoken = kitoken

    def __getattr__(self, name: str) -> object:
        return getattr(self._kitoken, name)

    def encode(self, text: str) -> list[int]:
        ids: list[int] = self._kitoken.encode(text)  # type: ignore[attr-defined]
        return ids[:-1] if "captain" in text else ids


def test_a_kitoken_that_is_wrong_about_a_piece_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load = encoder.kitoken_of
    monkeypatch.setattr(encoder, "kitoken_of", lambda *given: _Wrong(load(*given)))
    model_bytes = model_of("english")
    chosen = fastest_encoder(model_bytes, processor_of(model_bytes), ID_DTYPE)
    assert chosen.name == "sentencepiece"


def test_an_encoder_that_joins_words_wrongly_is_not_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wrong(self: WordEncoder, *arguments: object) -> Iterator[object]:
        return (ids[::-1] for ids in right(self, *arguments))

    right: Callable[..., Iterator[np.ndarray]] = WordEncoder._encode_by_words
    monkeypatch.setattr(WordEncoder, "_encode_by_words", wrong)
    model_bytes = model_of("english")
    chosen = fastest_encoder(model_bytes, processor_of(model_bytes), ID_DTYPE)
    assert chosen.name == "kitoken"


@given(st.lists(st.text(max_size=5)), st.integers(1, 20))
@example([], 1)
def test_batches_keep_the_order_and_end_when_full(texts: list[str], size: int) -> None:
    batches = list(in_batches(texts, size))
    assert [text for batch in batches for text in batch] == texts
    assert all(sum(map(len, batch[:-1])) < size for batch in batches)


EVERY_CHARACTER = st.characters(exclude_categories=())  # lone surrogates included
EVERY_TEXT = st.lists(
    st.one_of(
        st.text(EVERY_CHARACTER, max_size=30),
        st.lists(HARD_PARTS | st.text(EVERY_CHARACTER, max_size=3), max_size=12).map("".join),
    ),
    max_size=5,
)


@pytest.mark.parametrize("direction", Direction)
@pytest.mark.parametrize("unit", Unit)
@given(texts=EVERY_TEXT)
@example(texts=["", " \u2581 \ud800", "the  old captain "])
def test_encode_documents_equals_encode_document_of_each(
    direction: Direction, unit: Unit, texts: list[str]
) -> None:
    patient, eager = _codec(direction, unit, 1 << 30), _codec(direction, unit, 0)
    together = [ids.tolist() for ids in eager.encode_documents(texts)]
    assert together == [patient.encode_document(text).tolist() for text in texts]
    assert [eager.render(ids) for ids in together] == texts


@cache
def _codec(direction: Direction, unit: Unit, characters_before_fastest: int) -> TextCodec:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text, "_CHARACTERS_PER_PIECE", characters_before_fastest)
        return TextCodec(model_of("english"), direction, unit)


def test_a_codec_switches_to_the_fastest_encoder_for_much_text() -> None:
    codec = TextCodec(model_of("english"), Direction.FORWARD, Unit.TOKEN)
    codec.encode("the captain")
    assert "_fastest" not in vars(codec)
    codec.encode("the captain " * 20_000)
    assert "_fastest" in vars(codec)


def test_a_codec_that_has_encoded_much_survives_pickling() -> None:
    codec = _codec(Direction.BACKWARD, Unit.TOKEN, 0)
    codec.encode("the captain")
    copy = pickle.loads(pickle.dumps(codec))
    assert copy.encoder_name == codec.encoder_name == "kitoken by distinct words"
