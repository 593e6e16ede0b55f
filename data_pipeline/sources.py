"""Documents from files, hub data sets and this Python's documentation, in independent slices.

A source is `pydocs`; a file, a folder or a pattern, on this machine or behind a URL; or
`hf:NAME[:CONFIG]`. Listing depends on what the source holds and on nothing else, so every process
lists the same slices. Texts are passed on byte for byte, empty ones included: dropping, cleaning
and splitting are left to the reader.
"""

from collections.abc import Iterator
from pathlib import Path

from data_pipeline.errors import OutputExistsError, SourceEmptyError
from data_pipeline.file_source import list_files, read_file, refused
from data_pipeline.files import find_files, local_path
from data_pipeline.hub_source import list_hub_slices, read_hub_slice
from data_pipeline.pydocs import list_pydocs_slices, read_pydocs_slice
from data_pipeline.remote import is_url, shown_url
from data_pipeline.slices import (
    AnyColumns,
    Columns,
    Document,
    OnBadRecord,
    Slice,
    require_no_columns,
    stop_at_bad_record,
)

__all__ = [
    "AnyColumns",
    "Columns",
    "Document",
    "OnBadRecord",
    "Slice",
    "list_slices",
    "read_slice",
    "require_outside",
    "stop_at_bad_record",
]

_HUB_PREFIX = "hf:"


def list_slices(source: str, columns: AnyColumns = Columns()) -> tuple[Slice, ...]:
    """The slices of a source, in an order that only its contents decide.

    A folder gives the parquet and jsonl files below it or, where it has none, the text files: what
    lies beside data is a README or a licence. Hidden files are left out. A file of suffix .json
    must hold one object a line. `columns` names what is read of parquet, jsonl and hub records.
    Raises SourceMissingError, SourceEmptyError, SourceUnreadableError, BackendError.
    """
    if source == "pydocs":
        require_no_columns(columns, source)
        return list_pydocs_slices()
    if source.startswith(_HUB_PREFIX) and not is_url(source):
        slices = list_hub_slices(source.removeprefix(_HUB_PREFIX), columns)
    else:
        try:
            slices = list_files(find_files(source), columns)
        except OSError as error:
            raise refused(str(error.filename or source), error) from None
    if not any(piece.size_bytes or piece.kind == "hub" for piece in slices):
        raise SourceEmptyError(
            f"{shown_url(source)}: nothing is in it; name a source that holds text"
        )
    return tuple(slices)


def read_slice(
    piece: Slice,
    columns: AnyColumns = Columns(),
    on_bad_record: OnBadRecord = stop_at_bad_record,
) -> Iterator[Document]:
    """The documents of one slice, in order, holding no more than a few of them in memory.

    A malformed record is given to `on_bad_record`, and left out if that returns. Raises what that
    raises, and SourceUnreadableError when the slice is corrupt or no longer what was listed.
    """
    if piece.kind == "pydocs":
        return read_pydocs_slice(piece)
    if piece.kind == "hub":
        return read_hub_slice(piece, columns, on_bad_record)
    return read_file(piece, columns, on_bad_record)


def require_outside(source: str, out: Path) -> None:
    """Raises OutputExistsError when what is written to `out` would become part of the source."""
    folder = local_path(source)
    if folder and folder.is_dir() and out.resolve().is_relative_to(folder.resolve()):
        raise OutputExistsError(
            f"{out} lies within the source {source}, of which it would become a part; "
            "choose another --out"
        )
