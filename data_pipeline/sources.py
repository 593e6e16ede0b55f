"""Documents from files, hub data sets and this Python's documentation, in independent slices.

A source is `pydocs`; a file, a folder or a pattern; or `hf:NAME[:CONFIG]`. Listing depends on what
the source holds and on nothing else, so every process lists the same slices. Texts are passed on
byte for byte, empty ones included: dropping, cleaning and splitting are left to the reader.
"""

import codecs
import glob
import gzip
import json
import os
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import zstandard

from data_pipeline.errors import (
    BadRecordError,
    OutputExistsError,
    SourceEmptyError,
    SourceMissingError,
    SourceUnreadableError,
)
from data_pipeline.hub_source import list_hub_slices, read_hub_slice
from data_pipeline.parquet_source import list_parquet_slices, read_parquet_slice
from data_pipeline.pydocs import list_pydocs_slices, read_pydocs_slice
from data_pipeline.slices import Document, Slice, file_stamp, record_text, require_stamp

__all__ = ["Document", "Slice", "list_slices", "read_slice"]

_COMPRESSIONS = (".gz", ".zst")
_KINDS = {
    ".parquet": "parquet",
    **dict.fromkeys((".jsonl", ".ndjson", ".json"), "jsonl"),
    **dict.fromkeys((".txt", ".md", ".rst"), "text"),
}
_SUFFIXES = f"{', '.join(_KINDS)} (all but .parquet also with {' or '.join(_COMPRESSIONS)})"
_HUB_PREFIX = "hf:"
_CHUNK_BYTES = 128 << 10
_MAX_ZSTD_WINDOW_BYTES = 1 << 31  # `zstd --long=31` is the most that the format's tools write


def list_slices(source: str, *, text_column: str = "text") -> tuple[Slice, ...]:
    """The slices of a source, in an order that only its contents decide.

    A folder gives the parquet and jsonl files below it or, where it has none, the text files: what
    lies beside data is a README or a licence. Hidden files are left out. A file of suffix .json
    must hold one object a line. `text_column` names the text in parquet, jsonl and hub
    records. Raises SourceMissingError, SourceEmptyError, SourceUnreadableError.
    """
    if source == "pydocs":
        return list_pydocs_slices()
    if source.startswith(_HUB_PREFIX):
        return list_hub_slices(source.removeprefix(_HUB_PREFIX), text_column)
    try:
        files = _find_files(source)
    except OSError as error:
        raise _refused(error.filename or source, error) from None
    slices = [piece for path in files for piece in _list_file(path, text_column)]
    if not any(piece.size_bytes for piece in slices):
        raise SourceEmptyError(f"{source}: nothing is in it; name a source that holds text")
    return tuple(slices)


def read_slice(piece: Slice, *, text_column: str = "text") -> Iterator[Document]:
    """The documents of one slice, in order, holding no more than a few of them in memory.

    Raises SourceUnreadableError when the slice is corrupt or no longer what was listed, and
    BadRecordError when a record has no text.
    """
    if piece.kind == "pydocs":
        return read_pydocs_slice(piece)
    if piece.kind == "hub":
        return read_hub_slice(piece, text_column)
    return _read_file(piece, text_column)


def require_outside(source: str, out: Path) -> None:
    """Raises OutputExistsError when what is written to `out` would become part of the source."""
    folder = Path(source)
    if folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise OutputExistsError(
            f"{out} lies within the source {source}, of which it would become a part; "
            "choose another --out"
        )


def _find_files(source: str) -> list[Path]:
    """Absolute paths of a source's supported files, sorted. Raises OSError, SourceMissingError."""
    path = Path(source).expanduser()
    if not source:  # Path("") would be the folder we are in
        matches = []
    elif path.exists():
        matches = [path]
    else:
        # Path.glob takes no absolute patterns.
        matches = [Path(match) for match in glob.glob(str(path), recursive=True)]  # noqa: PTH207
    if not matches:
        raise SourceMissingError(
            f"{source or '(empty)'}: there is no such file or folder, and no file matches it as a "
            "pattern; a source is `pydocs`, a path, a quoted pattern, or `hf:NAME` on the hub"
        )
    files = {
        # Not resolved: the files that a hub cache links to have no suffix.
        Path(os.path.abspath(file))  # noqa: PTH100
        for match in matches
        for file in (_data_below(match) if match.is_dir() else [match])
        if _kind(file)
    }
    if not files:
        raise SourceMissingError(f"{source}: no file has a suffix that can be read: {_SUFFIXES}")
    return sorted(files)


def _data_below(root: Path) -> list[Path]:
    files = [file for file in _files_below(root) if _kind(file)]
    return [file for file in files if _kind(file) != "text"] or files


def _files_below(root: Path) -> Iterator[Path]:
    def stop(error: OSError) -> None:
        raise error

    for folder, subfolders, names in os.walk(root, onerror=stop):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        yield from (Path(folder, name) for name in names if not name.startswith("."))


def _kind(path: Path) -> str | None:
    suffix = path.suffix.lower()
    if suffix in _COMPRESSIONS:
        kind = _KINDS.get(Path(path.stem).suffix.lower())
        return None if kind == "parquet" else kind
    return _KINDS.get(suffix)


def _list_file(path: Path, text_column: str) -> Iterable[Slice]:
    kind = _kind(path) or ""
    try:
        size_bytes = path.stat().st_size
        stamp = file_stamp(path)
    except OSError as error:
        raise _refused(path, error) from None
    if kind == "parquet":
        return list_parquet_slices(path, stamp, text_column)
    if size_bytes == 0 and path.suffix.lower() in _COMPRESSIONS:
        raise _corrupt(path, "it has no bytes")
    return [Slice(kind, str(path), 0, 1, size_bytes, stamp)]


def _read_file(piece: Slice, text_column: str) -> Iterator[Document]:
    path = Path(piece.path)
    try:
        require_stamp(piece, file_stamp(path))
        if piece.kind == "parquet":
            yield from read_parquet_slice(piece, text_column)
        elif piece.kind == "jsonl":
            yield from _read_jsonl(path, text_column)
        else:
            yield _read_text(path)
    except (EOFError, zlib.error, gzip.BadGzipFile, zstandard.ZstdError) as error:
        raise _corrupt(path, error) from None
    except OSError as error:
        raise _refused(path, error) from None


def _read_text(path: Path) -> Document:
    raw = b"".join(_chunks(path))
    try:
        return Document(raw.decode(), path.name)
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _not_utf8(f"{path}:{line}", error) from None


def _read_jsonl(path: Path, text_column: str) -> Iterator[Document]:
    for number, line in enumerate(_lines(_chunks(path)), start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        if line.strip():
            record = _parse_record(line, f"{path}:{number}")
            text = record_text(record, text_column, f"{path}:{number}")
            yield Document(text, f"{path.name}:{number}")


def _parse_record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = json.loads(line.decode())
    except UnicodeDecodeError as error:
        raise _not_utf8(where, error) from None
    except (ValueError, RecursionError) as error:  # also numbers too long, brackets too deep
        place = f" at column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
        reason = f"{getattr(error, 'msg', error)}{place}"
        raise BadRecordError(
            f"{where}: not valid JSON ({reason}); mend or remove the line, "
            "which must hold one JSON object"
        ) from None
    if not isinstance(record, dict):
        raise BadRecordError(
            f"{where}: a JSON {type(record).__name__}, not an object with columns; "
            "a file of records holds one object a line"
        )
    return record


def _chunks(path: Path) -> Iterator[bytes]:
    """The file's bytes, decompressed, in pieces. Raises what the decompressors raise."""
    suffix = path.suffix.lower()
    if suffix == ".gz":
        with gzip.open(path, "rb") as file:
            yield from iter(lambda: file.read(_CHUNK_BYTES), b"")
    else:
        with path.open("rb") as file:
            blocks = iter(lambda: file.read(_CHUNK_BYTES), b"")
            yield from _decompress_zst(blocks) if suffix == ".zst" else blocks


def _decompress_zst(blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Every frame of a file. The library's own reader takes a truncated frame for the end."""
    decompressor = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW_BYTES)
    frame = None
    for block in blocks:
        rest = block
        while rest:
            frame = frame or decompressor.decompressobj()
            yield frame.decompress(rest)
            rest = frame.unused_data if frame.eof else b""
            frame = None if frame.eof else frame
    if frame:
        raise EOFError("the last frame is not complete")


def _lines(chunks: Iterable[bytes]) -> Iterator[bytes]:
    """Lines without their newline; only b"\\n" ends one."""
    parts: list[bytes] = []
    for chunk in chunks:
        first, *others = chunk.split(b"\n")
        parts.append(first)
        for other in others:
            yield b"".join(parts)
            parts = [other]
    yield b"".join(parts)


def _not_utf8(where: str, error: UnicodeDecodeError) -> BadRecordError:
    value = error.object[error.start]
    return BadRecordError(
        f"{where}: byte 0x{value:02X} is not valid UTF-8; convert the file to UTF-8"
    )


def _refused(path: str | Path, error: OSError) -> SourceUnreadableError:
    return SourceUnreadableError(
        f"{path}: {error.strerror or error}; check that the file is there and may be read"
    )


def _corrupt(path: Path, reason: object) -> SourceUnreadableError:
    return SourceUnreadableError(
        f"{path}: truncated, or not what its suffix says ({reason}); fetch or write it again"
    )
