"""Documents from parquet files, in slices of consecutive row groups.

A file is cut by its metadata alone, so that a big one is shared by many readers; memory is bounded
by a batch of rows and one column chunk's compressed pages.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.slices import Document, Slice, record_text

SLICE_BYTES = 64 << 20
_BATCH_ROWS = 256
_BUFFER_BYTES = 1 << 20


def list_parquet_slices(path: Path, stamp: str, text_column: str) -> Iterator[Slice]:
    """Slices of about 64 MiB of text; none for a file without rows.

    Raises SourceUnreadableError when the file is no parquet, or has no such column of strings.
    """
    import pyarrow as pa

    try:
        with _open(path) as file:
            schema, metadata = file.schema_arrow, file.metadata
            leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, error) from None
    columns = ", ".join(schema.names) or "none"
    if text_column not in schema.names:
        raise SourceUnreadableError(
            f"{path}: no column {text_column!r}; the columns are {columns}: "
            "name the one with the text with --text-column"
        )
    column_type = schema.field(text_column).type
    value_type = getattr(column_type, "value_type", column_type)
    is_dictionary = pa.types.is_dictionary(column_type)
    if text_column not in leaves or not _is_string(value_type if is_dictionary else column_type):
        raise SourceUnreadableError(
            f"{path}: column {text_column!r} holds {column_type}, not strings; the columns are "
            f"{columns}: name the one with the text with --text-column"
        )
    leaf = leaves.index(text_column)
    start = size_bytes = 0
    for group in range(metadata.num_row_groups):
        size_bytes += metadata.row_group(group).column(leaf).total_uncompressed_size
        if size_bytes >= SLICE_BYTES or group == metadata.num_row_groups - 1:
            if any(metadata.row_group(index).num_rows for index in range(start, group + 1)):
                yield Slice("parquet", str(path), start, group + 1, size_bytes, stamp)
            start, size_bytes = group + 1, 0


def read_parquet_slice(piece: Slice, text_column: str) -> Iterator[Document]:
    """Documents of some row groups. Raises SourceUnreadableError, BadRecordError."""
    import pyarrow as pa

    path = Path(piece.path)
    try:
        with _open(path) as file:
            row = sum(file.metadata.row_group(group).num_rows for group in range(piece.start))
            columns = dict.fromkeys(file.schema_arrow.names)
            batches = file.iter_batches(
                _BATCH_ROWS,
                row_groups=range(piece.start, piece.stop),
                columns=[text_column],
                use_threads=False,
            )
            for batch in batches:
                for value in batch.column(text_column):
                    where = f"{path} row {row}"
                    record = {**columns, text_column: _python_value(value, where)}
                    text = record_text(record, text_column, where)
                    yield Document(text, f"{path.name} row {row}")
                    row += 1
    except (pa.ArrowException, OSError) as error:
        raise _corrupt(path, error) from None


def _open(path: Path) -> Any:
    from pyarrow.parquet import ParquetFile

    return ParquetFile(path, buffer_size=_BUFFER_BYTES, page_checksum_verification=True)


def _is_string(column_type: Any) -> bool:
    return str(column_type) in {"string", "large_string", "string_view"}


def _python_value(value: Any, where: str) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise BadRecordError(
            f"{where}: the text is not valid UTF-8; mend or remove the row"
        ) from None


def _corrupt(path: Path, error: Exception) -> SourceUnreadableError:
    reason = " ".join(str(error).split()) or type(error).__name__
    return SourceUnreadableError(
        f"{path}: truncated, or not a parquet file ({reason}); fetch or write it again"
    )
