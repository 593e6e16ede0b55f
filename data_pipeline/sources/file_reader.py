"""Documents from files: parquet by row groups, zip archives by members, and whole files.

Local and remote files are handled in the same way; remote files are listed by several threads.
"""

import codecs
import json
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial

from data_pipeline.errors import SourceMissingError, SourceUnreadableError
from data_pipeline.redaction import is_url, shown_url
from data_pipeline.sources.content import read_content
from data_pipeline.sources.decompression import COMPRESSIONS, CORRUPT_ERRORS, corrupt, decompressed
from data_pipeline.sources.documents import (
    AnyColumns,
    Document,
    OnBadRecord,
    Slice,
    require_no_columns,
    require_stamp,
)
from data_pipeline.sources.files import DataFile, kind_of, name_of, stat_address
from data_pipeline.sources.html_text import require_html_reader
from data_pipeline.sources.parquet import list_parquet_slices, read_parquet_slice
from data_pipeline.sources.zip_files import list_zip_slices, read_zip_slice
from data_pipeline.storage.address_variables import kept

# Files of other kinds are one slice.
_LISTERS = {"parquet": list_parquet_slices, "zip": list_zip_slices}
_READERS = {"parquet": read_parquet_slice, "zip": read_zip_slice}
_LISTING_THREADS = 16
_LONGEST_FIRST_LINE_BYTES = 4 << 20


def list_files(
    addresses: Iterable[str],
    columns: AnyColumns,
    *,
    skips_bad: bool | None = None,
    kind: str | None = None,
) -> list[Slice]:
    """Slices of files, in the order of the files; `kind` None: by suffix.

    A parquet file without the requested columns is an error. With `skips_bad`, if other files have
    them, it is listed, and each of its rows is a malformed record. `skips_bad` None: the caller has
    no such option. Raises SourceMissingError, SourceUnreadableError, BackendError.
    """
    addresses = [kept(address) for address in addresses]
    list_file = partial(_list_file, columns=columns, kind=kind)
    if any(is_url(address) for address in addresses):
        # Listing a file takes a few round trips and little CPU time.
        pool = ThreadPoolExecutor(_LISTING_THREADS)
        try:
            listed = list(pool.map(list_file, addresses))
        finally:
            pool.shutdown(cancel_futures=True)
    else:
        listed = [list_file(address) for address in addresses]
    faults = [fault for _, fault in listed if fault]
    if faults and len(faults) == sum(bool(slices) for slices, _ in listed):
        raise SourceUnreadableError(faults[0])
    if faults and not skips_bad:
        advice = "; or skip and count the rows of such files with `on_bad_record` skip"
        raise SourceUnreadableError(f"{faults[0]}{'' if skips_bad is None else advice}")
    return [piece for slices, _ in listed for piece in slices]


def read_file(
    piece: Slice, columns: AnyColumns, on_bad_record: OnBadRecord, max_record_bytes: int
) -> Iterator[Document]:
    """Documents of one slice of a file. Raises SourceUnreadableError, BadRecordError."""
    shown = shown_url(piece.path)
    try:
        file = stat_address(piece.path)
        require_stamp(piece, file.stamp)
        read = _READERS.get(piece.kind, _read_whole)
        yield from read(file, piece, columns, on_bad_record, max_record_bytes)
        if is_url(piece.path):  # not all servers report the version with each range
            require_stamp(piece, stat_address(piece.path).stamp)
    except CORRUPT_ERRORS as error:
        raise corrupt(shown, error) from None
    except OSError as error:
        raise refused(shown, error) from None


def holds_records(address: str, max_record_bytes: int) -> bool:
    """Whether a file begins with a JSON array, or with a line that is one JSON object.

    Raises SourceUnreadableError.
    """
    head = b""
    try:
        for chunk in _chunks(stat_address(address), address, max_record_bytes):
            head = (head + chunk).lstrip()
            if b"\n" in head or head.startswith(b"[") or len(head) > _LONGEST_FIRST_LINE_BYTES:
                break
        first_line = head.removeprefix(codecs.BOM_UTF8).partition(b"\n")[0]
        return first_line.startswith(b"[") or isinstance(json.loads(first_line), dict)
    except CORRUPT_ERRORS:
        return False
    except (ValueError, RecursionError):  # mostly a pretty-printed list of records
        return False
    except OSError as error:
        raise refused(shown_url(address), error) from None


def refused(address: str, error: OSError) -> SourceUnreadableError:
    """The error for a file that the operating system or a server refuses to read."""
    return SourceUnreadableError(
        f"{address}: {error.strerror or error}; check that the file exists and is readable"
    )


def _list_file(
    address: str, columns: AnyColumns, kind: str | None
) -> tuple[list[Slice], str | None]:
    """Slices of a file, and the reason if none of its rows can be read."""
    kind = kind or kind_of(address) or ""
    shown = shown_url(address)
    try:
        file = stat_address(address)
        if kind in _LISTERS:
            slices, fault = _LISTERS[kind](file, address, columns)
            return slices, fault and f"{shown}: {fault}"
    except OSError as error:
        if isinstance(error, FileNotFoundError) and is_url(address):
            raise SourceMissingError(
                f"{shown}: {error.strerror or 'no such file'}; check the address"
            ) from None
        raise refused(shown, error) from None
    if kind == "html":
        require_html_reader()
    if kind in ("text", "html", "lines"):
        require_no_columns(columns, shown)
    if file.size_bytes == 0 and name_of(address).suffix.lower() in COMPRESSIONS:
        raise corrupt(shown, "it is empty")
    return [
        Slice(
            kind=kind, path=address, start=0, stop=1, size_bytes=file.size_bytes, stamp=file.stamp
        )
    ], None


def _read_whole(
    file: DataFile,
    piece: Slice,
    columns: AnyColumns,
    on_bad_record: OnBadRecord,
    max_record_bytes: int,
) -> Iterator[Document]:
    chunks = _chunks(file, piece.path, max_record_bytes)
    how = (columns, on_bad_record, max_record_bytes)
    return read_content(piece.kind, shown_url(piece.path), chunks, *how)


def _chunks(file: DataFile, address: str, max_record_bytes: int) -> Iterator[bytes]:
    """Decompressed bytes of a file, in pieces. Raises errors of the decompressors."""
    with file.stream() as stream:
        yield from decompressed(stream, name_of(address).suffix, file.shown, max_record_bytes)
