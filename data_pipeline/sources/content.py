"""The documents in the bytes of one file: a text, JSON in lines or otherwise, or an HTML page.

The bytes come decompressed, from a file of its own or from within an archive.
"""

import itertools
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import PurePath

from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.sources.documents import AnyColumns, Document, OnBadRecord, documents_of
from data_pipeline.sources.encodings import as_utf8, encoding_of
from data_pipeline.sources.html_text import html_text
from data_pipeline.sources.json_array import read_array, read_values
from data_pipeline.sources.jsonl import lines, not_decodable, parse_record, require_object
from data_pipeline.sources.record_limits import joined, page_bytes, too_long

_Parse = Callable[[str], Mapping[str, object]]
"""Gives a record; what it raises, BadRecordError, begins with the place it is told."""


def read_content(
    kind: str,
    shown: str,
    chunks: Iterator[bytes],
    columns: AnyColumns,
    on_bad_record: OnBadRecord,
    max_record_bytes: int,
) -> Iterator[Document]:
    """The documents of a file of a kind; `shown` is its address, for messages.

    Raises what reading the chunks raises, SourceUnreadableError and BadRecordError.
    """
    if kind == "lines":
        yield from _read_lines(shown, chunks, on_bad_record, max_record_bytes)
        return
    if kind not in ("html", "text"):
        yield from _read_records(shown, chunks, columns, on_bad_record, max_record_bytes)
        return
    is_page = kind == "html"
    whole = joined(chunks, page_bytes(max_record_bytes) if is_page else max_record_bytes)
    if whole is None:
        what = "an HTML page longer than a sixteenth of what" if is_page else "longer than"
        on_bad_record(too_long(shown, max_record_bytes, what))
    elif is_page:
        yield Document(html_text(whole), PurePath(shown).name)
    else:
        yield from _read_text(shown, whole, on_bad_record)


def _read_text(shown: str, raw: bytes, on_bad_record: OnBadRecord) -> Iterator[Document]:
    try:
        text = raw.decode(encoding_of(raw))
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        on_bad_record(not_decodable(f"{shown}:{line}", error))
    else:
        yield Document(text, PurePath(shown).name)


def _read_lines(
    shown: str, chunks: Iterator[bytes], on_bad_record: OnBadRecord, max_record_bytes: int
) -> Iterator[Document]:
    """A document of each line that is not blank, as data sets of text on the hub are meant."""
    for number, line in lines(as_utf8(chunks), max_record_bytes):
        where = f"{shown}:{number}"
        try:
            if line is None:
                raise too_long(where, max_record_bytes)
            text = line.decode().removesuffix("\r")
        except UnicodeDecodeError as error:
            on_bad_record(not_decodable(where, error))
        except BadRecordError as error:
            on_bad_record(error)
        else:
            yield Document(text, f"{PurePath(shown).name}:{number}")


def _read_records(
    shown: str,
    chunks: Iterator[bytes],
    columns: AnyColumns,
    on_bad_record: OnBadRecord,
    max_record_bytes: int,
) -> Iterator[Document]:
    name = PurePath(shown).name

    try:
        for place, parse in _records(shown, as_utf8(chunks), max_record_bytes):
            where = f"{shown}{place}"
            try:
                # Not kept while the next one is read: a record may be long.
                found = documents_of(parse(where), columns, where, f"{name}{place}")
            except BadRecordError as error:
                on_bad_record(error)
            else:
                yield from found
    except UnicodeDecodeError as error:
        raise SourceUnreadableError(
            f"{shown}: not valid {error.encoding.upper()} throughout; convert the file to UTF-8"
        ) from None


def _records(
    shown: str, chunks: Iterator[bytes], max_record_bytes: int
) -> Iterator[tuple[str, _Parse]]:
    """The place of each record, a line or an element of an array, and what parses it."""
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
            read = read_values if is_spread else read_array
            for number, element in read(chunks, shown, max_record_bytes):
                yield f" element {number}", partial(require_object, element)
            return
    for line_number, line in lines(chunks, max_record_bytes):
        yield f":{line_number}", partial(parse_record, line, max_record_bytes=max_record_bytes)
