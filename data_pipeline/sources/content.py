"""Documents in one decompressed file: a text, JSON records or an HTML page.

The file may be a member of an archive.
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
"""Parser of a record. Raises BadRecordError, prefixed with its argument, the place."""


def read_content(
    kind: str,
    shown: str,
    chunks: Iterator[bytes],
    columns: AnyColumns,
    on_bad_record: OnBadRecord,
    max_record_bytes: int,
) -> Iterator[Document]:
    """Documents of a file of this kind; `shown`: its address, for messages.

    Raises SourceUnreadableError, BadRecordError, and errors of `chunks`.
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
    """One document per non-blank line, the convention of text data sets on the hub."""
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
                # Not kept in memory while the next one is read: a record may be long.
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
    """Place of each record, a line or an element of an array, and its parser."""
    if ".json" in (suffix.lower() for suffix in PurePath(shown).suffixes[-2:]):
        head = b""
        for chunk in chunks:
            head += chunk.lstrip() if not head else chunk
            if head:
                break
        chunks = itertools.chain([head], chunks)
        # A pretty-printed object; records of one line do not begin like this.
        is_spread = head.partition(b"\n")[0].rstrip() == b"{"
        if is_spread or head.startswith(b"["):
            read = read_values if is_spread else read_array
            for number, element in read(chunks, shown, max_record_bytes):
                yield f" element {number}", partial(require_object, element)
            return
    for line_number, line in lines(chunks, max_record_bytes):
        yield f":{line_number}", partial(parse_record, line, max_record_bytes=max_record_bytes)
