"""The documents in the bytes of one file: a text, JSON in lines or otherwise, or an HTML page.

The bytes come decompressed, from a file of its own or from within an archive.
"""

import itertools
from collections.abc import Iterator
from pathlib import PurePath

from data_pipeline.encodings import as_utf8, encoding_of
from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.html_text import html_text
from data_pipeline.json_array import read_array, read_values
from data_pipeline.json_lines import lines, not_decodable, parse_record, require_object
from data_pipeline.slices import AnyColumns, Document, OnBadRecord, documents_of


def read_content(
    kind: str,
    shown: str,
    chunks: Iterator[bytes],
    columns: AnyColumns,
    on_bad_record: OnBadRecord,
) -> Iterator[Document]:
    """The documents of a file of a kind; `shown` is its address, for messages.

    Raises what reading the chunks raises, SourceUnreadableError and BadRecordError.
    """
    if kind == "html":
        yield Document(html_text(b"".join(chunks)), PurePath(shown).name)
    elif kind == "text":
        yield from _read_text(shown, b"".join(chunks), on_bad_record)
    else:
        yield from _read_records(shown, chunks, columns, on_bad_record)


def _read_text(shown: str, raw: bytes, on_bad_record: OnBadRecord) -> Iterator[Document]:
    try:
        text = raw.decode(encoding_of(raw))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        on_bad_record(not_decodable(f"{shown}:{line}", error))
    else:
        yield Document(text, PurePath(shown).name)


def _read_records(
    shown: str, chunks: Iterator[bytes], columns: AnyColumns, on_bad_record: OnBadRecord
) -> Iterator[Document]:
    name = PurePath(shown).name
    try:
        for place, value in _records(shown, as_utf8(chunks)):
            where = f"{shown}{place}"
            try:
                record = (
                    parse_record(value, where)
                    if isinstance(value, bytes)
                    else require_object(value, where)
                )
                documents = documents_of(record, columns, where, f"{name}{place}")
            except BadRecordError as error:
                on_bad_record(error)
            else:
                yield from documents
    except UnicodeDecodeError as error:
        raise SourceUnreadableError(
            f"{shown}: not valid {error.encoding.upper()} throughout; convert the file to UTF-8"
        ) from None


def _records(shown: str, chunks: Iterator[bytes]) -> Iterator[tuple[str, object]]:
    """Each record with its place: a line's bytes, or an element of an array."""
    if ".json" in (suffix.lower() for suffix in PurePath(shown).suffixes[-2:]):
        head = b""
        for chunk in chunks:
            head += chunk.lstrip() if not head else chunk
            if head:
                break
        chunks = itertools.chain([head], chunks)
        # As pretty printers write an object; a record in one line is not begun so.
        is_spread = head.partition(b"\n")[0].rstrip() == b"{"
        if is_spread or head.startswith(b"["):
            for number, element in (read_values if is_spread else read_array)(chunks, shown):
                yield f" element {number}", element
            return
    for line_number, line in lines(chunks):
        yield f":{line_number}", line
