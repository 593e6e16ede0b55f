"""Documents from the files within a zip archive, in slices of consecutive files.

An archive is read like a folder: where it holds records, its texts are a README or a license.
"""

import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import PurePath

from data_pipeline.content import read_content
from data_pipeline.files import DataFile, kind_of, suffix_of
from data_pipeline.html_text import require_html_reader
from data_pipeline.json_lines import corrupt, decompressed
from data_pipeline.slices import AnyColumns, Columns, Document, OnBadRecord, Slice

_SLICE_BYTES = 64 << 20
_ENCRYPTED = 1


@dataclass(frozen=True)
class Member:
    """A file within an archive that can be read."""

    info: zipfile.ZipInfo
    kind: str

    @property
    def is_text(self) -> bool:
        return self.kind in ("text", "html")


def zip_members(file: DataFile, *, html: bool) -> tuple[list[Member], list[tuple[str, str]]]:
    """The files that are read, in the archive's order; and those that are not, after the cause.

    Raises OSError, SourceUnreadableError.
    """
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            return _members(archive, html=html)
    except (zipfile.BadZipFile, EOFError) as error:
        raise corrupt(file.shown, error) from None


def list_zip_slices(file: DataFile, address: str, columns: AnyColumns) -> tuple[list[Slice], bool]:
    """Slices of about 64 MiB of what is read; second: whether it has columns.

    Raises OSError, SourceUnreadableError, BackendError.
    """
    members, _ = zip_members(file, html=_reads_html(columns))
    if any(member.kind == "html" for member in members):
        require_html_reader()
    slices = []
    start = size_bytes = 0
    for stop, member in enumerate(members, start=1):
        size_bytes += member.info.file_size
        if size_bytes >= _SLICE_BYTES or stop == len(members):
            slices.append(Slice("zip", address, start, stop, size_bytes, file.stamp))
            start, size_bytes = stop, 0
    return slices, not all(member.is_text for member in members)


def read_zip_slice(
    file: DataFile, piece: Slice, columns: AnyColumns, on_bad_record: OnBadRecord
) -> Iterator[Document]:
    """Documents of some files of an archive.

    Raises OSError, SourceUnreadableError, BadRecordError, and what decompressors raise.
    """
    try:
        with file.stream() as stream, zipfile.ZipFile(stream) as archive:
            members, _ = _members(archive, html=_reads_html(columns))
            for member in members[piece.start : piece.stop]:
                name = member.info.filename
                with archive.open(member.info) as inner:
                    chunks = decompressed(inner, PurePath(name).suffix)  # type: ignore[arg-type]
                    shown = f"{file.shown}/{name}"
                    yield from read_content(member.kind, shown, chunks, columns, on_bad_record)
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError) as error:
        raise corrupt(file.shown, error) from None


def _members(archive: zipfile.ZipFile, *, html: bool) -> tuple[list[Member], list[tuple[str, str]]]:
    members = []
    left_out = []
    for info in archive.infolist():
        name = info.filename
        kind = kind_of(name)
        if info.is_dir():
            continue
        if any(part.startswith((".", "__MACOSX")) for part in PurePath(name).parts):
            left_out.append(("hidden", name))
        elif kind in (None, "parquet", "zip"):
            suffix = suffix_of(name) or "''"
            left_out.append((f"suffix {suffix} is not read within a zip", name))
        elif kind == "html" and not html:
            left_out.append(("an HTML page, which is read with --html", name))
        elif info.flag_bits & _ENCRYPTED:
            left_out.append(("encrypted within a zip", name))
        else:
            members.append(Member(info, kind or ""))
    records = [member for member in members if not member.is_text]
    if records:
        left_out += [
            ("text beside data within a zip", m.info.filename) for m in members if m.is_text
        ]
    return records or members, left_out


def _reads_html(columns: AnyColumns) -> bool:
    return isinstance(columns, Columns) and columns.html
