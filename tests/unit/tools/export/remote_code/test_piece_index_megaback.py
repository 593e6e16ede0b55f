"""The index of an export's vocabulary, against a scan of it."""

from hypothesis import given
from hypothesis import strategies as st

from tools.export.remote_code.piece_index_megaback import PieceIndex

_TEXTS = st.text("ab\u00e9", max_size=3).map(str.encode)


@given(st.lists(_TEXTS, max_size=12), _TEXTS.filter(bool), st.booleans())
def test_the_index_finds_what_a_scan_finds(texts: list[bytes], part: bytes, by_end: bool) -> None:
    contains = bytes.endswith if by_end else bytes.startswith
    index = PieceIndex(texts, by_end=by_end)
    expected = [i for i, text in enumerate(texts) if contains(text, part)]
    assert index.containing(part) == expected
    assert index.ids == [i for i, text in enumerate(texts) if text]
    assert index.ids_without_text == [i for i, text in enumerate(texts) if not text]
