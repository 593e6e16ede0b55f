"""Documents from files: parquet by row groups, lines of JSON, and plain texts.

Local and remote files are listed and read alike; remote ones are looked at by a few threads.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from data_pipeline.errors import BadRecordError, SourceMissingError, SourceUnreadableError
from data_pipeline.files import COMPRESSIONS, DataFile, kind_of, look_at, name_of
from data_pipeline.json_lines import (
    CORRUPT_ERRORS,
    corrupt,
    decompressed,
    lines,
    not_utf8,
    parse_record,
)
from data_pipeline.parquet_source import list_parquet_slices, read_parquet_slice
from data_pipeline.remote import is_url, shown_url
from data_pipeline.slices import (
    AnyColumns,
    Document,
    OnBadRecord,
    Slice,
    documents_of,
    require_no_columns,
    require_stamp,
)

_LISTING_THREADS = 16
_LONGEST_FIRST_LINE_BYTES = 4 << 20


def list_files(addresses: Iterable[str], columns: AnyColumns) -> list[Slice]:
    """The slices of files, in the order of the files.

    Raises SourceMissingError, SourceUnreadableError, BackendError.
    """
    addresses = list(addresses)
    list_file = partial(_list_file, columns=columns)
    if not any(is_url(address) for address in addresses):
        return [piece for address in addresses for piece in list_file(address)]
    # Each of thousands of files costs a few round trips and hardly any work.
    pool = ThreadPoolExecutor(_LISTING_THREADS)
    try:
        return [piece for pieces in pool.map(list_file, addresses) for piece in pieces]
    finally:
        pool.shutdown(cancel_futures=True)


def read_file(piece: Slice, columns: AnyColumns, on_bad_record: OnBadRecord) -> Iterator[Document]:
    """The documents of one slice of a file. Raises SourceUnreadableError, BadRecordError."""
    shown = shown_url(piece.path)
    try:
        file = look_at(piece.path)
        require_stamp(piece, file.stamp)
        if piece.kind == "parquet":
            yield from read_parquet_slice(file, piece, columns, on_bad_record)
        elif piece.kind == "jsonl":
            yield from _read_jsonl(file, piece, columns, on_bad_record)
        else:
            yield from _read_text(file, piece, on_bad_record)
        if is_url(piece.path):  # not all servers tell with each part which version it is of
            require_stamp(piece, look_at(piece.path).stamp)
    except CORRUPT_ERRORS as error:
        raise corrupt(shown, error) from None
    except OSError as error:
        raise refused(shown, error) from None


def holds_lines(address: str) -> bool:
    """Whether a file's first line that is not blank is a JSON object by itself.

    Raises SourceUnreadableError.
    """
    head = b""
    try:
        for chunk in _chunks(look_at(address), address):
            head = (head + chunk).lstrip()
            if b"\n" in head or len(head) > _LONGEST_FIRST_LINE_BYTES:
                break
        first_line = head.removeprefix(codecs.BOM_UTF8).partition(b"\n")[0]
        return isinstance(json.loads(first_line), dict)
    except CORRUPT_ERRORS:
        return False
    except (ValueError, RecursionError):  # a list of records over many lines, most often
        return False
    except OSError as error:
        raise refused(shown_url(address), error) from None


def refused(address: str, error: OSError) -> SourceUnreadableError:
    """The sentence for a file that the operating system or a server does not give."""
    return SourceUnreadableError(
        f"{address}: {error.strerror or error}; check that the file is there and may be read"
    )


def _list_file(address: str, columns: AnyColumns) -> list[Slice]:
    kind = kind_of(address) or ""
    shown = shown_url(address)
    try:
        file = look_at(address)
        if kind == "parquet":
            return list(list_parquet_slices(file, address, columns))
    except OSError as error:
        if isinstance(error, FileNotFoundError) and is_url(address):
            raise SourceMissingError(
                f"{shown}: {error.strerror or 'there is no such file'}; check the address"
            ) from None
        raise refused(shown, error) from None
    if kind == "text":
        require_no_columns(columns, shown)
    if file.size_bytes == 0 and name_of(address).suffix.lower() in COMPRESSIONS:
        raise corrupt(shown, "it has no bytes")
    return [Slice(kind, address, 0, 1, file.size_bytes, file.stamp)]


def _read_text(file: DataFile, piece: Slice, on_bad_record: OnBadRecord) -> Iterator[Document]:
    raw = b"".join(_chunks(file, piece.path))
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        on_bad_record(not_utf8(f"{file.shown}:{line}", error))
    else:
        yield Document(text, name_of(piece.path).name)


def _read_jsonl(
    file: DataFile, piece: Slice, columns: AnyColumns, on_bad_record: OnBadRecord
) -> Iterator[Document]:
    name = name_of(piece.path).name
    for number, line in lines(_chunks(file, piece.path)):
        where = f"{file.shown}:{number}"
        try:
            record = parse_record(line, where)
            documents = documents_of(record, columns, where, f"{name}:{number}")
        except BadRecordError as error:
            on_bad_record(error)
        else:
            yield from documents


def _chunks(file: DataFile, address: str) -> Iterator[bytes]:
    """The file's bytes, decompressed, in pieces. Raises what the decompressors raise."""
    with file.stream() as stream:
        yield from decompressed(stream, name_of(address).suffix)
