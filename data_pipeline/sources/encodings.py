"""Text encodings by byte order mark: UTF-8 with or without one, UTF-16 and UTF-32 with one.

A mark is not part of the text.
"""

import codecs
from collections.abc import Iterator

# The mark of UTF-32 begins with that of UTF-16.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_LONGEST_MARK_BYTES = 4


def encoding_of(head: bytes) -> str:
    """Encoding of a text, from its first bytes."""
    return next((name for mark, name in _MARKS if head.startswith(mark)), "utf-8")


def as_utf8(chunks: Iterator[bytes]) -> Iterator[bytes]:
    """Convert a text to UTF-8 without a byte order mark.

    UTF-8 is not validated. Raises UnicodeDecodeError for invalid UTF-16 or UTF-32.
    """
    head = b""
    for chunk in chunks:
        head += chunk
        if len(head) >= _LONGEST_MARK_BYTES:
            break
    encoding = encoding_of(head)
    if encoding.startswith("utf-8"):
        yield head.removeprefix(codecs.BOM_UTF8)
        yield from chunks
        return
    decoder = codecs.getincrementaldecoder(encoding)()
    yield decoder.decode(head).encode()
    for chunk in chunks:
        yield decoder.decode(chunk).encode()
    yield decoder.decode(b"", final=True).encode()
