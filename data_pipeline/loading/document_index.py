"""Document index: which documents each row of `data.rows: documents` holds.

Made once per data set, split and context from the lengths in the shards' indexes, by one process,
and kept in the user's cache folder: a data set may be remote, read-only or shared. The content is a
function of the data set alone. A few numbers per group of rows are held in memory; the documents of
a group are read when they are needed.

Layout: a zstd frame per group (u32 tokens of each document, u32 row of each), a zstd frame with the
header (JSON line) and, per group, the number of the first document, the first token and the offset,
int64 each; u64 size of that frame; 8 bytes of signature.
"""

import hashlib
import json
import logging
import os
import struct
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import zstandard

from data_pipeline.common.atomic import replacing
from data_pipeline.common.checked_json import made_from, parse_json, require_within
from data_pipeline.common.locks import locked
from data_pipeline.common.number_ranges import INT64_MAX
from data_pipeline.errors import ConfigError, ShardCorruptError, StorageError
from data_pipeline.loading.best_fit import Group, packed_groups
from data_pipeline.shards.data_set import DataSet
from data_pipeline.shards.manifest import ShardEntry

Indices = npt.NDArray[np.int64]

_LOG = logging.getLogger("megaback.data")
_SIGNATURE = b"MBDOCS\x00\x01"
_END = struct.Struct("<Q8s")
_MAX_GROUP_FRAMES = 16
_FEW_GROUPS = 16
"""Number of groups below which they are made smaller, and of equal size."""
_HELD_DOCUMENTS = 1 << 22
"""Number of documents up to which all lengths are held in memory while an index is made."""
_SHARDS_AT_ONCE = 32
_MAX_HEADER_BYTES = 1 << 12


@dataclass(frozen=True, kw_only=True)
class DocumentTotals:
    """Figures of all rows of a split."""

    context_tokens: int
    rows_per_group: int
    groups: int
    rows: int
    """Number of rows that hold documents."""
    documents: int
    tokens: int
    used_tokens: int
    """Tokens that rows read: a longer document is read up to `context_tokens` + 1 tokens."""
    cut_documents: int
    filled_positions: int
    """Positions of rows that hold a token rather than padding."""

    @property
    def used_share(self) -> float:
        """Share of the tokens that rows read."""
        return self.used_tokens / self.tokens

    @property
    def filled_share(self) -> float:
        """Share of the rows' positions that hold a token."""
        return self.filled_positions / (self.rows * self.context_tokens)

    def describe(self) -> str:
        return (
            f"rows read {self.used_share:.1%} of the tokens ({self.cut_documents:,} of "
            f"{self.documents:,} documents are longer than a row), and are "
            f"{self.filled_share:.1%} full; tokens of steps include the padding"
        )


class DocumentIndex:
    """The groups of a split's rows. Threads may share it, and a process may fork with it."""

    def __init__(self, file: IO[bytes], totals: DocumentTotals, table: Indices) -> None:
        """`table` has shape (3, groups + 1): first documents, first tokens and offsets."""
        self._file = file
        self.totals = totals
        self._first_document, self.first_token, self._offset = table

    @property
    def num_frames(self) -> int:
        """Number of groups, which the order permutes as frames."""
        return self.totals.groups

    @property
    def rows_per_frame(self) -> int:
        return self.totals.rows_per_group

    @property
    def rows_per_epoch(self) -> int:
        """Number of rows of all groups, empty ones included."""
        return self.num_frames * self.rows_per_frame

    def window_groups(self, window_frames: int, frame_tokens: int) -> int:
        """Number of groups that fill about as many rows as `window_frames` frames; at least 1."""
        tokens = self.totals.rows_per_group * self.totals.context_tokens
        return max(1, window_frames * frame_tokens // tokens)

    def locate(self, frame: Indices, row: Indices) -> tuple[Indices, Indices]:
        """Group and row of each place of the order, which are the same."""
        return frame, row

    def place_of(self, frame: Indices, row: Indices) -> tuple[Indices, Indices]:
        """The inverse of `locate`."""
        return frame, row

    def group(self, number: int) -> Group:
        """The documents of a group. Raises ShardCorruptError for an altered file."""
        start, stop = self._offset[number : number + 2].tolist()
        first, end = self._first_document[number : number + 2].tolist()
        try:
            data = os.pread(self._file.fileno(), stop - start, start)
            raw = _decompressed(data, 8 * (end - first))
            lengths, rows = np.frombuffer(raw, dtype="<u4").reshape(2, -1).astype(np.int64)
            tokens = int(self.first_token[number + 1] - self.first_token[number])
            if lengths.sum() != tokens or rows.max() >= self.totals.rows_per_group:
                raise ValueError("it contradicts the header")
            sizes = np.minimum(lengths, self.totals.context_tokens)
            if np.bincount(rows, sizes).max() > self.totals.context_tokens:
                raise ValueError("its documents do not fit its rows")
        except (OSError, ValueError, zstandard.ZstdError) as error:
            raise ShardCorruptError(
                f"the index of document rows {self._file.name} is damaged in group {number} "
                f"({error}); remove that file: the next start makes it again"
            ) from None
        return Group(lengths, rows)

    def find(self, token: int) -> tuple[int, int]:
        """Group and row of the document that has a token, counted over all shards of the split.

        Raises ShardCorruptError.
        """
        number = int(np.searchsorted(self.first_token, token, side="right")) - 1
        group = self.group(number)
        ends = int(self.first_token[number]) + np.cumsum(group.lengths)
        return number, int(group.rows[np.searchsorted(ends, token, side="right")])


def open_document_index(data_set: DataSet, split: str, context_tokens: int) -> DocumentIndex:
    """The index of a split's document rows, made if it is not in the cache folder.

    Raises ConfigError for shards of instruction examples, StorageError for a cache folder that
    cannot be written, and the errors of shards.
    """
    manifest = data_set.manifest
    if manifest.row_tokens is not None:
        raise ConfigError(
            f"data.rows is documents, but {data_set.name} holds instruction examples, which are "
            "never cut; remove data.rows"
        )
    identity = [manifest.fingerprint, split, context_tokens, _SIGNATURE.hex()]
    name = hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:32]
    folder = _cache_folder()
    path = folder / f"{name}.index"
    try:
        index = _read(path)
        if index is None:
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with locked(folder / f"{name}.lock"):
                index = _read(path)
                if index is None:
                    _LOG.info(
                        "packing the documents of %s into rows, once: %s", data_set.name, path
                    )
                    with replacing(path) as file:
                        _write(file, data_set, data_set.manifest.split(split), context_tokens)
                    index = _read(path)
    except OSError as error:
        raise StorageError(
            f"the index of document rows of {data_set.name} cannot be kept in {folder} "
            f"({error.strerror}); set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    assert index is not None
    return index


def _cache_folder() -> Path:
    """Folder of the indexes. Raises StorageError for a user without a home folder."""
    given = Path(os.environ.get("XDG_CACHE_HOME", ""))
    # Relative paths are ignored, as the XDG Base Directory Specification demands.
    try:
        base = given if given.is_absolute() else Path.home() / ".cache"
    except RuntimeError:
        raise StorageError(
            "the index of document rows is kept in ~/.cache/megaback, and this user has no home "
            "folder; set XDG_CACHE_HOME to a folder that can be written"
        ) from None
    return base / "megaback" / "document-rows"


def _write(
    file: IO[bytes], data_set: DataSet, entries: tuple[ShardEntry, ...], context_tokens: int
) -> None:
    frame_tokens = data_set.manifest.frame_tokens
    lengths: Iterable[Indices] = _lengths(data_set, entries)
    if sum(entry.documents for entry in entries) <= _HELD_DOCUMENTS:
        held = np.concatenate(list(lengths))
        rows_per_group, groups = _even_groups(held, context_tokens, frame_tokens)
    else:
        rows_per_group = _MAX_GROUP_FRAMES * (frame_tokens // context_tokens)
        groups = packed_groups(lengths, context_tokens, rows_per_group)
    compressor = zstandard.ZstdCompressor(level=3, write_checksum=True)
    counts = dict.fromkeys(("tokens", "used_tokens", "cut_documents", "filled_positions"), 0)
    table, rows, document, offset = [], 0, 0, 0
    for group in groups:
        table.append((document, counts["tokens"], offset))
        stored = np.stack([group.lengths, group.rows]).astype("<u4")
        offset += file.write(compressor.compress(stored.tobytes()))
        document += len(group.lengths)
        counts["tokens"] += int(group.lengths.sum())
        counts["used_tokens"] += int(np.minimum(group.lengths, context_tokens + 1).sum())
        counts["cut_documents"] += int(np.count_nonzero(group.lengths > context_tokens + 1))
        counts["filled_positions"] += int(np.minimum(group.lengths, context_tokens).sum())
        rows += group.num_rows
    table.append((document, counts["tokens"], offset))
    totals = DocumentTotals(
        context_tokens=context_tokens,
        rows_per_group=rows_per_group,
        groups=len(table) - 1,
        rows=rows,
        documents=document,
        **counts,
    )
    header = json.dumps(asdict(totals)).encode() + b"\n"
    tail = compressor.compress(header + np.array(table, dtype="<i8").T.tobytes())
    file.write(tail + _END.pack(len(tail), _SIGNATURE))


def _lengths(data_set: DataSet, entries: tuple[ShardEntry, ...]) -> Iterator[Indices]:
    """Tokens of each document of each shard, in order."""

    def read(entry: ShardEntry) -> Indices:
        with data_set.open_shard(entry) as reader:
            return reader.document_tokens()

    with ThreadPoolExecutor(4) as pool:
        for first in range(0, len(entries), _SHARDS_AT_ONCE):
            yield from pool.map(read, entries[first : first + _SHARDS_AT_ONCE])


def _even_groups(
    lengths: Indices, context_tokens: int, frame_tokens: int
) -> tuple[int, Iterable[Group]]:
    """Rows per group, and the groups, such that the last group has few empty rows.

    The groups of a small data set are smaller, so that it has enough of them for its lanes.
    """
    positions = int(np.minimum(lengths, context_tokens).sum())
    frames = min(max(positions // (_FEW_GROUPS * frame_tokens), 1), _MAX_GROUP_FRAMES)
    rows = frames * (frame_tokens // context_tokens)
    groups = list(packed_groups([lengths], context_tokens, rows))
    if len(groups) < _FEW_GROUPS:
        total = rows * (len(groups) - 1) + groups[-1].num_rows
        smallest = -(-total // len(groups))
        for fewer in range(smallest, rows, max(1, smallest // 128)):
            even = list(packed_groups([lengths], context_tokens, fewer))
            if len(even) == len(groups):
                return fewer, even
    return rows, groups


def _read(path: Path) -> DocumentIndex | None:
    """The index in a file; None if there is none, or it is damaged. Raises OSError."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return None
    try:
        file_bytes = os.fstat(file.fileno()).st_size
        size, signature = _END.unpack(_at(file, file_bytes - _END.size, _END.size))
        if signature != _SIGNATURE or size > file_bytes:
            raise ValueError("no signature")
        raw = _decompressed(_at(file, file_bytes - _END.size - size, size), file_bytes * 64)
        header, found, numbers = raw.partition(b"\n")
        if not found or len(header) > _MAX_HEADER_BYTES:
            raise ValueError("no header")
        totals = made_from(DocumentTotals, parse_json(header))
        for name, number in asdict(totals).items():
            require_within(name, number, 0, INT64_MAX)
        table = np.frombuffer(numbers, dtype="<i8").reshape(3, -1).astype(np.int64)
        if table.shape[1] != totals.groups + 1 or (np.diff(table) <= 0).any():
            raise ValueError("its table contradicts its header")
    except (ValueError, TypeError, struct.error, zstandard.ZstdError):
        file.close()
        return None
    return DocumentIndex(file, totals, table)


def _at(file: IO[bytes], offset: int, num_bytes: int) -> bytes:
    """Raises ValueError when the file is shorter."""
    data = os.pread(file.fileno(), num_bytes, offset) if offset >= 0 else b""
    if len(data) != num_bytes:
        raise ValueError("it is too short")
    return data


def _decompressed(data: bytes, max_bytes: int) -> bytes:
    """Raises ValueError for more content than expected, ZstdError for a damaged frame."""
    if zstandard.frame_content_size(data) > max_bytes:
        raise ValueError("its content is too large")
    return zstandard.ZstdDecompressor().decompress(data, allow_extra_data=False)
