"""Documents from parquet files, in slices of consecutive row groups.

A file is cut by its metadata alone, so that a big one is shared by many readers. Only the columns
that are asked for are read; memory is bounded by a batch of rows and a few pages of each column,
however large the file or a row group is.
"""

from collections.abc import Iterator
from typing import Any

from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.example_columns import ExampleColumns
from data_pipeline.files import DataFile
from data_pipeline.slices import (
    AnyColumns,
    Document,
    OnBadRecord,
    Slice,
    asked_columns,
    documents_of,
    require_columns,
)

SLICE_BYTES = 64 << 20
_BATCH_ROWS = 256


def list_parquet_slices(file: DataFile, address: str, columns: AnyColumns) -> Iterator[Slice]:
    """Slices of about 64 MiB of text; none for a file without rows.

    Raises SourceUnreadableError when the file is no parquet, or lacks a column of the right type.
    """
    import pyarrow as pa

    try:
        with _open(file) as parquet:
            schema, metadata = parquet.schema_arrow, parquet.metadata
            leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file.shown, error) from None
    require_columns(columns, schema.names, file.shown)
    _require_types(columns, schema, leaves, file.shown)
    if isinstance(columns, ExampleColumns):
        roots = columns.found_in(schema.names, file.shown)
        sized = [leaf for leaf, path in enumerate(leaves) if path.partition(".")[0] in roots]
    else:
        sized = [leaves.index(columns.text)]
    start = size_bytes = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        size_bytes += sum(row_group.column(leaf).total_uncompressed_size for leaf in sized)
        if size_bytes >= SLICE_BYTES or group == metadata.num_row_groups - 1:
            if any(metadata.row_group(index).num_rows for index in range(start, group + 1)):
                yield Slice("parquet", address, start, group + 1, size_bytes, file.stamp)
            start, size_bytes = group + 1, 0


def _columns_to_read(columns: AnyColumns, names: list[str], shown: str) -> list[str]:
    if isinstance(columns, ExampleColumns):
        return columns.found_in(names, shown)
    return list(dict.fromkeys(column for column, _, _ in asked_columns(columns)))


def _require_types(columns: AnyColumns, schema: Any, leaves: list[str], shown: str) -> None:
    """Raises SourceUnreadableError when a column of text or of scores holds something else."""
    if isinstance(columns, ExampleColumns):
        return  # records say for themselves what is in them
    for column, option, content in asked_columns(columns):
        column_type = schema.field(column).type
        is_score = column == columns.language_score
        fits = _is_number(column_type) if is_score else _is_string(column_type)
        if column not in leaves or not fits:
            raise SourceUnreadableError(
                f"{shown}: column {column!r} holds {column_type}, not "
                f"{'numbers' if is_score else 'strings'}; the columns are "
                f"{', '.join(schema.names)}: name the one with the {content} with {option}"
            )


def read_parquet_slice(
    file: DataFile, piece: Slice, columns: AnyColumns, on_bad_record: OnBadRecord
) -> Iterator[Document]:
    """Documents of some row groups. Raises OSError, SourceUnreadableError, BadRecordError."""
    import pyarrow as pa

    try:
        with _open(file) as parquet:
            row = sum(parquet.metadata.row_group(group).num_rows for group in range(piece.start))
            batches = parquet.iter_batches(
                _BATCH_ROWS,
                row_groups=range(piece.start, piece.stop),
                columns=_columns_to_read(columns, parquet.schema_arrow.names, file.shown),
                use_threads=False,
            )
            rows = _Rows(file.shown, parquet.schema_arrow.names, columns, on_bad_record)
            for batch in batches:
                yield from rows.documents(batch, row)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file.shown, error) from None


class _Rows:
    """Turns the rows of one file into documents."""

    def __init__(
        self, shown: str, names: list[str], columns: AnyColumns, on_bad_record: OnBadRecord
    ) -> None:
        self._shown = shown
        self._name = shown.rpartition("/")[2]
        self._names = names
        self._columns = columns
        self._on_bad_record = on_bad_record

    def documents(self, batch: Any, first_row: int) -> Iterator[Document]:
        """The documents of a batch: whole columns at once, or row by row where one is bad."""
        columns = self._columns
        if isinstance(columns, ExampleColumns):
            yield from self._one_by_one(batch, first_row)
            return
        none: list[Any] = [None] * batch.num_rows
        try:
            texts = batch.column(columns.text).to_pylist()
            languages = batch.column(columns.language).to_pylist() if columns.language else none
        except UnicodeDecodeError:
            texts = none
        if None in texts:
            yield from self._one_by_one(batch, first_row)
            return
        scores = none
        if columns.language_score:
            values = batch.column(columns.language_score).to_pylist()
            scores = [None if value is None else float(value) for value in values]
        for row, (text, language, score) in enumerate(
            zip(texts, languages, scores, strict=True), start=first_row
        ):
            yield Document(text, f"{self._name} row {row}", language, score)

    def _one_by_one(self, batch: Any, first_row: int) -> Iterator[Document]:
        for index in range(batch.num_rows):
            row = first_row + index
            where = f"{self._shown} row {row}"
            try:
                record = dict.fromkeys(self._names) | {
                    name: _python_value(batch.column(name)[index], name, where)
                    for name in batch.schema.names
                }
                documents = documents_of(record, self._columns, where, f"{self._name} row {row}")
            except BadRecordError as error:
                self._on_bad_record(error)
            else:
                yield from documents


def _open(file: DataFile) -> Any:
    from pyarrow.parquet import ParquetFile

    opened, buffer_bytes = file.parquet()
    return ParquetFile(
        opened,
        buffer_size=buffer_bytes,
        pre_buffer=False,  # it would hold the whole slice
        page_checksum_verification=True,
    )


def _is_string(column_type: Any) -> bool:
    import pyarrow as pa

    value_type = column_type.value_type if pa.types.is_dictionary(column_type) else column_type
    return str(value_type) in {"string", "large_string", "string_view"}


def _is_number(column_type: Any) -> bool:
    from pyarrow import types

    tests = (types.is_floating, types.is_integer, types.is_decimal)
    return any(test(column_type) for test in tests)


def _python_value(value: Any, column: str, where: str) -> object:
    try:
        return value.as_py()
    except UnicodeDecodeError:
        raise BadRecordError(
            f"{where}: column {column!r} is not valid UTF-8; fix or remove the row",
            "not valid UTF-8",
        ) from None


def _unreadable(shown: str, error: Exception) -> Exception:
    """What to raise: an error of the operating system as it is, one of the format in a sentence."""
    is_system = isinstance(error, OSError) and error.errno is not None
    if is_system or isinstance(error, FileNotFoundError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    return SourceUnreadableError(
        f"{shown}: truncated, or not a parquet file ({reason}); fetch or write it again"
    )
