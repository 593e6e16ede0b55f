"""Documents from parquet files, in slices of consecutive row groups.

Only metadata is read to slice a file, so that many readers can share it. Only requested columns are
read; memory is bounded by a batch of rows and a few pages of each column, whatever the size of file
and row groups.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from data_pipeline.common.packages import require_package
from data_pipeline.common.shown_names import shown_names
from data_pipeline.errors import BadRecordError, SourceUnreadableError
from data_pipeline.sources.columns import ExampleColumns
from data_pipeline.sources.documents import (
    AnyColumns,
    Document,
    OnBadRecord,
    Slice,
    asked_columns,
    documents_of,
    require_short,
)
from data_pipeline.sources.files import DataFile
from data_pipeline.sources.memory_fence import MemoryFence, count_arrow_memory
from data_pipeline.sources.record_limits import DEFAULT_MAX_RECORD_BYTES, is_longer

SLICE_BYTES = 64 << 20
_BATCH_ROWS = 256
_BATCH_BYTES = 16 << 20
_MAX_EXPANSION = 1000  # larger claims of a footer are not text, and would make too many slices
_NAMED_ROWS = 10
"""Number of rows reported individually if all rows of a file are bad; others are counted."""
_MAX_TYPE_CHARACTERS = 100
_STRINGS = {"string", "large_string", "string_view"}
_BINARIES = {"binary", "large_binary", "binary_view"}
"""Types of UTF-8 bytes by programs that do not mark columns as text."""


def list_parquet_slices(
    file: DataFile, address: str, columns: AnyColumns
) -> tuple[list[Slice], str | None]:
    """Slices of about 64 MiB of text, and the reason if none of the rows can be read.

    A file without rows has no slices, whatever its columns. Raises SourceUnreadableError when the
    file is not parquet.
    """
    with MemoryFence(file.shown, DEFAULT_MAX_RECORD_BYTES).up():
        parquet, schema, leaves = _open(file)
    metadata = parquet.metadata
    parquet.close()
    if metadata.num_rows == 0:
        return [], None
    fault = _fault(columns, schema, leaves)
    names = set() if fault else set(_columns_to_read(columns, schema.names))
    if not isinstance(columns, ExampleColumns):
        names &= {columns.text}
    sized = [leaf for leaf, path in enumerate(leaves) if _is_within(path, names)]
    slices = []
    start = size_bytes = 0
    for group in range(metadata.num_row_groups):
        row_group = metadata.row_group(group)
        size_bytes += sum(_text_bytes(row_group.column(leaf), file.size_bytes) for leaf in sized)
        if size_bytes >= SLICE_BYTES or group == metadata.num_row_groups - 1:
            if any(metadata.row_group(index).num_rows for index in range(start, group + 1)):
                slices.append(
                    Slice(
                        kind="parquet",
                        path=address,
                        start=start,
                        stop=group + 1,
                        size_bytes=size_bytes,
                        stamp=file.stamp,
                    )
                )
            start, size_bytes = group + 1, 0
    return slices, None if fault is None else fault.message


def read_parquet_slice(
    file: DataFile,
    piece: Slice,
    columns: AnyColumns,
    on_bad_record: OnBadRecord,
    max_record_bytes: int,
) -> Iterator[Document]:
    """Documents of some row groups. Raises OSError, SourceUnreadableError, BadRecordError."""
    import pyarrow as pa

    fence = MemoryFence(file.shown, max_record_bytes)
    with fence.up():
        opened, schema, leaves = _open(file)
    try:
        with opened as parquet:
            metadata = parquet.metadata
            groups = range(piece.start, piece.stop)
            row = sum(metadata.row_group(group).num_rows for group in range(piece.start))
            if fault := _fault(columns, schema, leaves):
                num_rows = sum(metadata.row_group(group).num_rows for group in groups)
                for index in range(min(num_rows, _NAMED_ROWS + 1)):
                    where = f"{file.shown} row {row + index}"
                    number = 1 if index < _NAMED_ROWS else num_rows - _NAMED_ROWS
                    on_bad_record(
                        BadRecordError(f"{where}: {fault.message}", fault.cause, number=number)
                    )
                return
            batches = parquet.iter_batches(
                _batch_rows(metadata, groups, _columns_to_read(columns, schema.names), leaves),
                row_groups=groups,
                columns=_columns_to_read(columns, schema.names),
                use_threads=False,
            )
            rows = _Rows(file.shown, schema.names, columns, on_bad_record, max_record_bytes, fence)
            for batch in fence.each(batches):
                yield from rows.documents(batch, row)
                row += batch.num_rows
    except (pa.ArrowException, OSError) as error:
        raise _unreadable(file.shown, error) from None


@dataclass(frozen=True)
class _Fault:
    """Reason why no row of a file can be read."""

    cause: str
    message: str


def _fault(columns: AnyColumns, schema: Any, leaves: list[str]) -> _Fault | None:
    """The fault of the requested columns, or None."""
    names = schema.names
    shown = shown_names(names)
    if isinstance(columns, ExampleColumns):
        try:
            asked = columns.found_in(names, "")
        except SourceUnreadableError as error:
            return _Fault("no columns with examples", str(error).removeprefix(": "))
    else:
        asked = _columns_to_read(columns, names)
        for column, option, content in asked_columns(columns):
            advice = f"the columns are {shown}: name the one with the {content} with {option}"
            if column not in names:
                return _Fault(f"no column {column!r}", f"no column {column!r}; {advice}")
            if names.count(column) > 1:
                continue
            column_type = schema.field(column).type
            is_score = column == columns.language_score
            fits = _is_number(column_type) if is_score else _is_string(column_type)
            if column not in leaves or not fits:
                wanted = "numbers" if is_score else "strings"
                held = str(column_type)[:_MAX_TYPE_CHARACTERS]
                cause = f"column {column!r} has type {held}, not {wanted}"
                return _Fault(cause, f"{cause}; {advice}")
    for column in asked:
        if names.count(column) > 1:
            cause = f"{names.count(column)} columns are called {column!r}"
            return _Fault(cause, f"{cause} (the columns are {shown}); rename all but one of them")
    return None


def _columns_to_read(columns: AnyColumns, names: list[str]) -> list[str]:
    if isinstance(columns, ExampleColumns):
        return columns.found_in(names, "")
    return list(dict.fromkeys(column for column, _, _ in asked_columns(columns)))


def _text_bytes(chunk: Any, file_bytes: int) -> int:
    """Uncompressed size of a column chunk, bounded by a plausible expansion."""
    stored_bytes = min(max(chunk.total_compressed_size, 0), file_bytes)
    claimed_bytes = max(int(chunk.total_uncompressed_size), 0)
    return min(claimed_bytes, _MAX_EXPANSION * int(stored_bytes))


def _batch_rows(metadata: Any, groups: range, names: list[str], leaves: list[str]) -> int:
    """Number of rows per batch of about 16 MiB, for the row group with the largest rows."""
    read = [leaf for leaf, path in enumerate(leaves) if _is_within(path, {*names})]
    row_bytes = 1
    for group in map(metadata.row_group, groups):
        size_bytes = sum(group.column(leaf).total_uncompressed_size for leaf in read)
        row_bytes = max(row_bytes, size_bytes // max(group.num_rows, 1))
    return min(max(_BATCH_BYTES // row_bytes, 1), _BATCH_ROWS)


def _is_within(path: str, names: set[str]) -> bool:
    """Whether a leaf is one of the columns, or nested in one."""
    return any(path == name or path.startswith(f"{name}.") for name in names)


class _Rows:
    """Converts rows of one file to documents."""

    def __init__(
        self,
        shown: str,
        names: list[str],
        columns: AnyColumns,
        on_bad_record: OnBadRecord,
        max_record_bytes: int,
        fence: MemoryFence,
    ) -> None:
        self._shown = shown
        self._name = shown.rpartition("/")[2]
        self._names = names
        self._columns = columns
        self._on_bad_record = on_bad_record
        self._max_record_bytes = max_record_bytes
        self._fence = fence

    def documents(self, batch: Any, first_row: int) -> Iterator[Document]:
        """Documents of a batch: by columns, or row by row if one is bad."""
        columns = self._columns
        if isinstance(columns, ExampleColumns):
            yield from self._one_by_one(batch, first_row)
            return
        none: list[Any] = [None] * batch.num_rows
        try:
            with self._fence.up():
                texts = _strings(batch.column(columns.text))
                languages = _strings(batch.column(columns.language)) if columns.language else none
        except UnicodeDecodeError:
            texts = none
        if None in texts or any(is_longer(text, self._max_record_bytes) for text in texts):
            yield from self._one_by_one(batch, first_row)
            return
        scores = none
        if columns.language_score:
            values = batch.column(columns.language_score).to_pylist()
            scores = [None if value is None else float(value) for value in values]
            if not all(score is None or math.isfinite(score) for score in scores):
                yield from self._one_by_one(batch, first_row)
                return
        for row, (text, language, score) in enumerate(
            zip(texts, languages, scores, strict=True), start=first_row
        ):
            yield Document(
                text=text,
                position=f"{self._name} row {row}",
                language=language,
                language_score=score,
            )

    def _one_by_one(self, batch: Any, first_row: int) -> Iterator[Document]:
        for index in range(batch.num_rows):
            row = first_row + index
            where = f"{self._shown} row {row}"
            try:
                with self._fence.up():
                    record = dict.fromkeys(self._names) | {
                        name: _python_value(batch.column(name)[index], name, where)
                        for name in batch.schema.names
                    }
                documents = documents_of(record, self._columns, where, f"{self._name} row {row}")
                require_short(documents, where, self._max_record_bytes)
            except BadRecordError as error:
                self._on_bad_record(error)
            else:
                yield from documents


def _open(file: DataFile) -> tuple[Any, Any, list[str]]:
    """The opened file, its schema and the paths of its leaves.

    Raises SourceUnreadableError, and BackendError without pyarrow.
    """
    require_package("pyarrow", file.shown)
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    count_arrow_memory()
    opened, buffer_bytes = file.parquet()
    try:
        parquet = ParquetFile(
            opened,
            buffer_size=buffer_bytes,
            pre_buffer=False,  # it would hold the whole slice
            page_checksum_verification=True,
        )
        schema, metadata = parquet.schema_arrow, parquet.metadata
        leaves = [metadata.schema.column(leaf).path for leaf in range(metadata.num_columns)]
        return parquet, schema, leaves if schema.names else []
    except (pa.ArrowException, OSError, ValueError) as error:  # also for names that are not UTF-8
        raise _unreadable(file.shown, error) from None


def _is_string(column_type: Any) -> bool:
    """Whether a column may contain texts: strings, bytes or only nulls."""
    return str(_stored_type(column_type)) in {*_STRINGS, *_BINARIES, "null"}


def _stored_type(column_type: Any) -> Any:
    import pyarrow as pa

    if pa.types.is_dictionary(column_type):
        return column_type.value_type
    return getattr(column_type, "storage_type", column_type)


def _is_number(column_type: Any) -> bool:
    from pyarrow import types

    tests = (types.is_floating, types.is_integer, types.is_decimal, types.is_null)
    return any(test(column_type) for test in tests)


def _strings(column: Any) -> list[Any]:
    """The values of a column. Raises UnicodeDecodeError."""
    values: list[Any] = column.to_pylist()
    if str(_stored_type(column.type)) in _BINARIES:
        return [None if value is None else value.decode() for value in values]
    return values


def _python_value(value: Any, column: str, where: str) -> object:
    try:
        found = value.as_py()
        return found.decode() if isinstance(found, bytes) else found
    except UnicodeDecodeError:
        raise BadRecordError(
            f"{where}: column {column!r} is not valid UTF-8; fix or remove the row",
            "not valid UTF-8",
        ) from None


def _unreadable(shown: str, error: Exception) -> Exception:
    """The error to raise: one of the operating system unchanged, one of the format converted."""
    is_system = isinstance(error, OSError) and error.errno is not None
    if is_system or isinstance(error, FileNotFoundError):
        return error
    reason = " ".join(str(error).split()) or type(error).__name__
    return SourceUnreadableError(
        f"{shown}: truncated, or not a parquet file ({reason}); fetch or write it again"
    )
