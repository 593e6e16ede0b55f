"""Documents from zip archives, in slices of consecutive files.

An archive is read like a folder: if it contains records, its text files are skipped.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.sources.content import read_content
from data_pipeline.sources.decompression import corrupt, decompressed
from data_pipeline.sources.documents import (
    AnyColumns,
    Columns,
    Document,
    OnBadRecord,
    Slice,
    require_no_columns,
)
from data_pipeline.sources.files import DataFile, kind_of, suffix_of
from data_pipeline.sources.html_text import require_html_reader
from data_pipeline.sources.zip_directory import METHODS, ZIP_ERRORS, open_zip

_SLICE_BYTES = 64 << 20
_ENCRYPTED = 1


@dataclass(frozen=True)
class Member:
    """A readable file within an archive."""

    info: zipfile.ZipInfo
    kind: str

    @property
    def is_text(self) -> bool:
        return self.kind in ("text", "html")


def zip_members(file: DataFile, *, html: bool) -> tuple[list[Member], list[tuple[str, str]]]:
    """Readable files, in the archive's order, and causes and names of the skipped ones.

    Raises OSError, SourceUnreadableError.
    """
    with file.stream() as stream, open_zip(stream, file.shown) as archive:
        return _members(archive, html=html)


def list_zip_slices(file: DataFile, address: str, columns: AnyColumns) -> tuple[list[Slice], None]:
    """Slices of about 64 MiB of readable files.

    Raises OSError, SourceUnreadableError, BackendError, and as `require_no_columns` for texts.
    """
    members, _ = zip_members(file, html=_reads_html(columns))
    if any(member.kind == "html" for member in members):
        require_html_reader()
    slices = []
    start = size_bytes = 0
    for stop, member in enumerate(members, start=1):
        size_bytes += member.info.file_size
        if size_bytes >= _SLICE_BYTES or stop == len(members):
            slices.append(
                Slice(
                    kind="zip",
                    path=address,
                    start=start,
                    stop=stop,
                    size_bytes=size_bytes,
                    stamp=file.stamp,
                )
            )
            start, size_bytes = stop, 0
    if all(member.is_text for member in members):
        require_no_columns(columns, file.shown)
    return slices, None


def read_zip_slice(
    file: DataFile,
    piece: Slice,
    columns: AnyColumns,
    on_bad_record: OnBadRecord,
    max_record_bytes: int,
) -> Iterator[Document]:
    """Documents of one slice of an archive.

    Raises OSError, SourceUnreadableError, BadRecordError, and errors of decompressors.
    """
    with file.stream() as stream, open_zip(stream, file.shown) as archive:
        members, _ = _members(archive, html=_reads_html(columns))
        for member in members[piece.start : piece.stop]:
            shown = f"{file.shown}/{member.info.filename}"
            chunks = _chunks(archive, member.info, shown, max_record_bytes)
            how = (columns, on_bad_record, max_record_bytes)
            yield from read_content(member.kind, shown, chunks, *how)


def _chunks(
    archive: zipfile.ZipFile, info: zipfile.ZipInfo, shown: str, max_record_bytes: int
) -> Iterator[bytes]:
    """Decompressed bytes of a file, in pieces. Raises OSError, SourceUnreadableError."""
    if info.compress_type not in METHODS:
        raise SourceUnreadableError(
            f"{shown}: the compression method is not supported within a zip (number "
            f"{info.compress_type}); unpack the archive and name the folder"
        )
    try:
        with archive.open(info) as inner:
            suffix = PurePath(info.filename).suffix
            yield from decompressed(inner, suffix, shown, max_record_bytes)  # type: ignore[arg-type]
    except ZIP_ERRORS as error:
        raise corrupt(shown, error) from None


def _members(archive: zipfile.ZipFile, *, html: bool) -> tuple[list[Member], list[tuple[str, str]]]:
    members = []
    excluded = []
    for info in archive.infolist():
        name = info.filename
        if not name:  # `is_dir` fails on it
            excluded.append(("without a name within a zip", "''"))
            continue
        kind = kind_of(name)
        if info.is_dir():
            continue
        if any(part.startswith((".", "__MACOSX")) for part in PurePath(name).parts):
            excluded.append(("hidden", name))
        elif kind in (None, "parquet", "zip"):
            suffix = suffix_of(name) or "''"
            excluded.append((f"suffix {suffix} is not read within a zip", name))
        elif kind == "html" and not html:
            excluded.append(("an HTML page, which is read with `html`", name))
        elif info.flag_bits & _ENCRYPTED:
            excluded.append(("encrypted within a zip", name))
        else:
            members.append(Member(info, kind or ""))
    records = [member for member in members if not member.is_text]
    if records:
        excluded += [
            ("text beside data within a zip", m.info.filename) for m in members if m.is_text
        ]
    return records or members, excluded


def _reads_html(columns: AnyColumns) -> bool:
    return isinstance(columns, Columns) and columns.html
