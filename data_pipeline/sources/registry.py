"""Documents from files, hub data sets, novels and Python's documentation, in independent slices.

A source is `novels` or `pydocs`; a local or remote file, folder or pattern; or `hf:NAME[:CONFIG]`.
Listing depends only on the contents of the source, so that every process lists the same slices.
Texts are returned unchanged, empty ones included, and without filtering, cleaning or splitting.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from data_pipeline.common.local_paths import local_path
from data_pipeline.errors import ConfigError, OutputExistsError, SourceEmptyError
from data_pipeline.redaction import is_url, place_of, shown_url
from data_pipeline.sources.documents import (
    AnyColumns,
    Columns,
    Document,
    OnBadRecord,
    Slice,
    require_no_columns,
    stop_at_bad_record,
)
from data_pipeline.sources.file_reader import list_files, read_file, refused
from data_pipeline.sources.finding import find_files
from data_pipeline.sources.hub import list_hub_slices, read_hub_slice
from data_pipeline.sources.novels.source import list_novels_slices, read_novels_slice
from data_pipeline.sources.pydocs import list_pydocs_slices, read_pydocs_slice
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES
from data_pipeline.sources.skipped import Skipped
from data_pipeline.storage.address_variables import kept

__all__ = [
    "BUILT_IN",
    "AnyColumns",
    "Columns",
    "Document",
    "Listing",
    "OnBadRecord",
    "Slice",
    "list_slices",
    "list_source",
    "read_slice",
    "require_none_shared",
    "require_outside",
    "stop_at_bad_record",
]

BUILT_IN = ("novels", "pydocs")
"""Sources that need neither files nor a network."""

_HUB_PREFIX = "hf:"


@dataclass(frozen=True)
class Listing:
    """Slices of a source, and its skipped files."""

    slices: tuple[Slice, ...]
    """Slices, in an order that depends only on the source's contents."""
    skipped: Skipped = field(default_factory=dict)
    linked: tuple[str, ...] = ()
    """Targets of links to folders outside the source."""

    def require_outside(self, source: str, out: Path) -> None:
        """Raises OutputExistsError when a link leads to `out` or to a folder above it."""
        for folder in self.linked:
            if out.resolve().is_relative_to(folder):
                raise _within(source, out)


def list_slices(source: str, columns: AnyColumns = Columns()) -> tuple[Slice, ...]:
    """Slices of a source: see `list_source`."""
    return list_source(source, columns).slices


def list_source(
    source: str,
    columns: AnyColumns = Columns(),
    *,
    skips_bad: bool | None = None,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> Listing:
    """List a source; `skips_bad`: whether malformed records will be skipped.

    Of a folder or zip archive, the parquet and jsonl files are read or, if there are none, the text
    files: texts next to data are mostly READMEs and licenses. A .json file contains one object per
    line, or one array. `columns`: columns of parquet, jsonl and hub records. Raises
    SourceMissingError, SourceEmptyError, SourceUnreadableError, BackendError.
    """
    source = kept(source)
    list_kind = _LISTERS[_kind_of(source)]
    listing = list_kind(source, columns, skips_bad=skips_bad, max_record_bytes=max_record_bytes)
    if not any(piece.size_bytes or piece.kind in ("hub", "parquet") for piece in listing.slices):
        raise SourceEmptyError(f"{shown_url(source)}: the source is empty; name one with text")
    return listing


def read_slice(
    piece: Slice,
    columns: AnyColumns = Columns(),
    on_bad_record: OnBadRecord = stop_at_bad_record,
    max_record_bytes: int = DEFAULT_MAX_RECORD_BYTES,
) -> Iterator[Document]:
    """Documents of one slice, in order; only a few are in memory at a time.

    A record that is malformed or longer than `max_record_bytes` is passed to `on_bad_record`, and
    skipped if that returns. Raises its errors, and SourceUnreadableError when the slice is corrupt
    or has changed since listing.
    """
    read = _READERS.get(piece.kind, read_file)
    return read(piece, columns, on_bad_record, max_record_bytes)


def require_outside(source: str, out: Path) -> None:
    """Raises OutputExistsError when `out` would become part of the source."""
    path = local_path(source)
    if path is None:
        return
    if path.is_dir():
        is_within = out.resolve().is_relative_to(path.resolve())
    else:  # only `**` matches within folders, and the only matching suffix there is JSON
        pattern = os.path.abspath(path)  # noqa: PTH100 - a pattern must not be resolved
        is_within = "**" in pattern and fnmatch(str(out.absolute() / "x.json"), pattern)
    if is_within:
        raise _within(source, out)


def require_none_shared(train: Iterable[Slice], val: Iterable[Slice]) -> None:
    """Raises ConfigError when the train set and the val set share a file."""
    trained_on: dict[tuple[str, str], list[Slice]] = {}
    for piece in train:
        trained_on.setdefault(_place(piece), []).append(piece)
    for held_out in val:
        for piece in trained_on.get(_place(held_out), []):
            if piece.start < held_out.stop and held_out.start < piece.stop:
                raise ConfigError(
                    f"{shown_url(held_out.path)} is in both `source` and `val_source`, so the val "
                    "set would be trained on; name other files for one of them, or use "
                    "`val_fraction` instead of `val_source`"
                )


def _kind_of(source: str) -> str:
    if source in BUILT_IN:
        return source
    return "hub" if source.startswith(_HUB_PREFIX) and not is_url(source) else "file"


def _list_pydocs(source: str, columns: AnyColumns, **_: Any) -> Listing:
    require_no_columns(columns, source)
    return Listing(list_pydocs_slices())


def _list_novels(source: str, columns: AnyColumns, **_: Any) -> Listing:
    require_no_columns(columns, source)
    return Listing(list_novels_slices())


def _list_hub(source: str, columns: AnyColumns, **how: Any) -> Listing:
    return Listing(tuple(list_hub_slices(source.removeprefix(_HUB_PREFIX), columns, **how)))


def _list_files(source: str, columns: AnyColumns, *, skips_bad: bool | None, **_: Any) -> Listing:
    try:
        files = find_files(source, html=isinstance(columns, Columns) and columns.html)
        slices = list_files(files.readable, columns, skips_bad=skips_bad)
    except OSError as error:
        raise refused(str(error.filename or source), error) from None
    return Listing(tuple(slices), files.skipped, tuple(files.linked))


_LISTERS: dict[str, Callable[..., Listing]] = {
    "novels": _list_novels,
    "pydocs": _list_pydocs,
    "hub": _list_hub,
    "file": _list_files,
}
_READERS: dict[str, Callable[[Slice, AnyColumns, OnBadRecord, int], Iterator[Document]]] = {
    "novels": lambda piece, *_: read_novels_slice(piece),
    "pydocs": lambda piece, *_: read_pydocs_slice(piece),
    "hub": read_hub_slice,
}


def _place(piece: Slice) -> tuple[str, str]:
    """Identity of a slice's file, independent of links and signatures."""
    is_local = piece.kind not in (*BUILT_IN, "hub") and not is_url(piece.path)
    return piece.kind, os.path.realpath(piece.path) if is_local else place_of(piece.path)


def _within(source: str, out: Path) -> OutputExistsError:
    return OutputExistsError(
        f"{out} is within the source {source}, and would become part of it; choose another `out`"
    )
