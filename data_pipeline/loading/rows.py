"""Row reader: turns places of rows into the packed arrays of a training step.

A row is `context_tokens` ids of a frame and their targets. Documents are packed one after another:
attention segments (`cu_seqlens`) and positions restart at every begin marker and at every row.
Targets are ignored past a frame's end, and from one document's end marker to the next one's begin
marker.

In rows of instruction examples, marks of the ids give segments and targets. No example crosses a
row's end, so none attends to another or is cut.

A run may read `token` shards against their stored direction. Each row's window of
`context_tokens + 1` ids is then read from its other end with begin and end markers exchanged, so
that both directions see the same windows in the same steps. A model of both directions reads each
row in one of them (`directions`).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ConfigError, DirectionMismatchError
from data_pipeline.loading.directions import IGNORED_TARGET as IGNORED_TARGET
from data_pipeline.loading.directions import Flags, exchange, mark_directions
from data_pipeline.loading.frame_store import FrameStore, Marks
from data_pipeline.shards.examples import HAS_LOSS, STARTS
from data_pipeline.text.codec import Direction, TextFormat, Unit

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Packed rows. T is rows x context_tokens.

    ids_T and targets_T are int64 of shape (T,); cu_seqlens is int32 of shape (segments + 1,), from
    0 to T: the starts of attention segments, where positions restart.
    """

    ids_T: npt.NDArray[np.int64]
    targets_T: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]
    num_targets: int
    num_skipped_rows: int
    """Rows of frames that could not be read and were skipped: they have no targets."""
    is_forward_N: Flags | None = None
    """Whether each row is read forward, for a model of both directions; else None."""
    num_forward_targets: int = 0
    """Targets of the rows that are read forward, of a model of both directions."""

    @property
    def positions_T(self) -> Indices:  # noqa: N802 - named as the arrays are
        """Positions within segments, int64 of shape (T,), computed on every access.

        Not stored: a device computes them from the segments faster than it receives them.
        """
        starts = self.cu_seqlens[:-1].astype(np.int64)
        return np.arange(self.cu_seqlens[-1]) - np.repeat(starts, np.diff(self.cu_seqlens))

    def rows(self, context_tokens: int) -> Iterator["Batch"]:
        """Yield each row as a batch of views; skipped rows are not counted in them."""
        starts = np.arange(0, len(self.ids_T), context_tokens)
        firsts = np.searchsorted(self.cu_seqlens, [*starts, len(self.ids_T)])
        for start, (first, last) in zip(starts.tolist(), pairwise(firsts.tolist()), strict=True):
            targets = self.targets_T[start : start + context_tokens]
            num_targets = int(np.count_nonzero(targets != IGNORED_TARGET))
            of_row = self.is_forward_N
            if of_row is not None:
                of_row = of_row[start // context_tokens :][:1]
            yield Batch(
                ids_T=self.ids_T[start : start + context_tokens],
                targets_T=targets,
                cu_seqlens=self.cu_seqlens[first : last + 1] - np.int32(start),
                num_targets=num_targets,
                num_skipped_rows=0,
                is_forward_N=of_row,
                num_forward_targets=0 if of_row is None else num_targets * int(of_row[0]),
            )


class RowReader:
    """Reads rows of one data set in the direction of the run, or each row in one of both."""

    def __init__(
        self, frames: FrameStore, context_tokens: int, direction: Direction, *, both: bool = False
    ) -> None:
        """`both`: the rows are for a model of both directions.

        Raises ConfigError or DirectionMismatchError for incompatible shards.
        """
        manifest = frames.manifest
        check_context(context_tokens, manifest.frame_tokens)
        if manifest.row_tokens is not None:
            _check_examples(
                context_tokens, manifest.row_tokens, manifest.text_format, direction, both=both
            )
        self.text_format = format_read_as(manifest.text_format, direction, both=both)
        self.frames = frames
        self.context_tokens = context_tokens
        self.begin_id = manifest.begin_id
        self.end_id = manifest.end_id
        self.is_flipped = direction is not manifest.text_format.direction

    def keep(
        self,
        windows: int,
        window_frames: int,
        ahead_rows: int = 0,  # noqa: ARG002
    ) -> None:
        """Keep the frames of some windows of an order decoded, and those that `ahead_rows` rows of
        each following window need."""
        self.frames.keep(windows * (window_frames + 2))

    def frames_of(
        self,
        frame: Indices,
        row: Indices,  # noqa: ARG002
        is_forward_N: Flags | None = None,  # noqa: ARG002
    ) -> Indices:
        """Stored frames that rows need."""
        return frame

    def window(self, frame: int, row: int) -> Indices:
        """The ids of a row and the one after it, in reading order: at most context_tokens + 1."""
        rows = read_rows([self], *(np.array([number]) for number in (0, frame, row)))
        window = np.concatenate([rows.ids_NC[0], rows.next_N])
        return window[: max(rows.lengths_N[0], 0)].astype(np.int64)

    def batch(self, frame: Indices, row: Indices) -> Batch:
        """Pack the rows at these places. A row past the end of a short frame has no targets."""
        rows = read_rows([self], np.zeros_like(frame), frame, row)
        (batch,) = pack(rows, self.begin_id, self.end_id, len(frame))
        return batch

    def read(self, frame: Indices, row: Indices, is_forward_N: Flags | None = None) -> "Rows":
        """Rows in reading order. Raises the errors of the frames.

        `is_forward_N`: which rows a model of both directions reads forward; by default all are in
        the direction of the text format.
        """
        frames = self.frames
        ids_NC, next_N, marks_NC = frames.rows(frame, row, self.context_tokens)
        lengths_N = frames.num_tokens(frame) - row * self.context_tokens
        lengths_N = np.minimum(np.maximum(lengths_N, 0), self.context_tokens + 1)
        if frames.skipped_frames:
            lengths_N[frames.is_skipped(frame)] = -1
        if lengths_N.min(initial=1) <= 0:
            ids_NC[lengths_N <= 0] = self.end_id
            if marks_NC is not None:
                marks_NC[lengths_N <= 0] = 0
        rows = Rows(ids_NC, next_N, lengths_N, marks_NC)
        if not self.text_format.both:
            return _flipped(rows, self.begin_id, self.end_id) if self.is_flipped else rows
        is_forward_N = self.are_forward(len(frame), is_forward_N)
        other = self.are_flipped(is_forward_N)
        flipped = _flipped(
            Rows(ids_NC[other], next_N[other], lengths_N[other]), self.begin_id, self.end_id
        )
        ids_NC[other], next_N[other] = flipped.ids_NC, flipped.next_N
        return replace(rows, is_forward_N=is_forward_N)

    def are_forward(self, num_rows: int, is_forward_N: Flags | None) -> Flags:
        """Flags of the rows that a model of both directions reads forward: default, all or none."""
        if is_forward_N is not None:
            return is_forward_N
        return np.full(num_rows, self.text_format.direction is Direction.FORWARD)

    def are_flipped(self, is_forward_N: Flags) -> Flags:
        """Flags of the rows that a model of both directions reads against the stored direction."""
        stored = self.frames.manifest.text_format.direction
        are_flipped: Flags = is_forward_N != (stored is Direction.FORWARD)
        return are_flipped


@dataclass(frozen=True)
class Rows:
    """Rows in reading order: N windows of C = context_tokens ids and the one after them.

    Window i has lengths_N[i] ids: up to C + 1, 0 past the end of a short frame, -1 in a skipped
    frame. The rest is end markers, which attend to the ids before them and to which no id attends;
    a missing id after a row has no meaning.
    """

    ids_NC: npt.NDArray[np.unsignedinteger[Any]]
    next_N: npt.NDArray[np.unsignedinteger[Any]]
    lengths_N: Indices
    marks_NC: Marks | None = None
    """Marks of each id of instruction examples (examples.py); None for documents."""
    is_forward_N: Flags | None = None
    """Whether each row is in forward order, for a model of both directions; else None. Documents
    of either order are still between begin and end markers."""
    are_whole: bool = False
    """Whether rows begin with documents, each of which is whole or fills its row and the id after
    it, so that no end marker has a target."""


def read_rows(
    readers: Sequence[RowReader],
    reader: Indices,
    frame: Indices,
    row: Indices,
    is_forward_N: Flags | None = None,
) -> Rows:
    """Rows of several data sets of one format: row i is in a frame of readers[reader[i]].

    Raises the errors of the frames.
    """
    if len(readers) == 1:
        return readers[0].read(frame, row, is_forward_N)
    parts = [np.flatnonzero(reader == number) for number in range(len(readers))]
    read = [
        one.read(frame[part], row[part], None if is_forward_N is None else is_forward_N[part])
        for one, part in zip(readers, parts, strict=True)
    ]
    back = np.argsort(np.concatenate(parts), kind="stable")
    marks = [rows.marks_NC for rows in read if rows.marks_NC is not None]
    return Rows(
        np.concatenate([rows.ids_NC for rows in read])[back],
        np.concatenate([rows.next_N for rows in read])[back],
        np.concatenate([rows.lengths_N for rows in read])[back],
        np.concatenate(marks)[back] if marks else None,
        is_forward_N,
        are_whole=all(rows.are_whole for rows in read),
    )


def _flipped(rows: Rows, begin_id: int, end_id: int) -> Rows:
    """The same windows from their other end, with begin and end markers exchanged."""
    context_tokens = rows.ids_NC.shape[1]
    ids_NC = np.empty_like(rows.ids_NC)
    ids_NC[:, 0] = rows.next_N
    ids_NC[:, 1:] = rows.ids_NC[:, :0:-1]
    next_N = rows.ids_NC[:, 0].copy()
    for number in np.flatnonzero(rows.lengths_N <= context_tokens).tolist():
        length = max(rows.lengths_N[number], 0)
        ids_NC[number, :length] = rows.ids_NC[number, :length][::-1]
        ids_NC[number, length:] = begin_id  # exchanged below
    for ids in (ids_NC, next_N):
        exchange(ids, begin_id, end_id)
    return Rows(ids_NC, next_N, rows.lengths_N)


def pack(rows: Rows, begin_id: int, end_id: int, micro_batch_rows: int) -> list[Batch]:
    """Batches of `micro_batch_rows` rows each."""
    num_rows, context_tokens = rows.ids_NC.shape
    total = num_rows * context_tokens
    # One block: two would be freed and page-faulted again at every step.
    ids_T, targets_T = np.empty((2, total), dtype=np.int64)
    ids_T.reshape(rows.ids_NC.shape)[:] = rows.ids_NC
    targets_T[:-1] = ids_T[1:]
    targets_NC = targets_T.reshape(rows.ids_NC.shape)
    targets_NC[:, -1] = rows.next_N
    if rows.are_whole:
        inner, num_targets_N = _ignore_ends(rows, targets_T, begin_id, end_id)
    elif rows.marks_NC is None:
        num_targets_N = _ignore_short(rows, targets_NC)
        inner = _ignore_between(rows, ids_T, targets_T, num_targets_N, begin_id, end_id)
    else:
        _ignore_short(rows, targets_NC)
        has_loss_NC = rows.marks_NC & HAS_LOSS != 0
        targets_NC[~has_loss_NC] = IGNORED_TARGET
        num_targets_N = has_loss_NC.sum(axis=1)
        segments = np.flatnonzero(rows.marks_NC & STARTS)
        inner = segments[segments % context_tokens > 0]

    is_forward_N = rows.is_forward_N
    if is_forward_N is not None:
        ids_NC = ids_T.reshape(rows.ids_NC.shape)
        mark_directions(ids_NC, targets_NC, num_targets_N, is_forward_N, begin_id, end_id)

    starts, batch_starts = _edges(num_rows, context_tokens, micro_batch_rows)
    bounds = np.concatenate([starts, inner])
    bounds.sort()
    firsts = np.searchsorted(bounds, batch_starts).tolist()
    bounds = bounds.astype(np.int32)
    tokens = micro_batch_rows * context_tokens
    batches = []
    for number, (first, next_first) in enumerate(pairwise(firsts)):
        of_rows = slice(number * micro_batch_rows, (number + 1) * micro_batch_rows)
        of_tokens = slice(number * tokens, (number + 1) * tokens)
        batches.append(
            Batch(
                ids_T=ids_T[of_tokens],
                targets_T=targets_T[of_tokens],
                # Batches begin at rows, so the first start of the next one is the end.
                cu_seqlens=bounds[first : next_first + 1] - np.int32(number * tokens),
                num_targets=int(num_targets_N[of_rows].sum()),
                num_skipped_rows=int(np.count_nonzero(rows.lengths_N[of_rows] < 0)),
                is_forward_N=None if is_forward_N is None else is_forward_N[of_rows],
                num_forward_targets=0
                if is_forward_N is None
                else int(num_targets_N[of_rows][is_forward_N[of_rows]].sum()),
            )
        )
    return batches


def _ignore_between(
    rows: Rows,
    ids_T: Indices,
    targets_T: Indices,
    num_targets_N: Indices,
    begin_id: int,
    end_id: int,
) -> Indices:
    """Ignore targets between documents. Returns the starts of documents within rows."""
    num_rows, context_tokens = rows.ids_NC.shape
    begins = np.flatnonzero(
        rows.ids_NC == begin_id
    )  # ids of rows have fewer bytes than packed ones
    inner = begins[begins % context_tokens > 0]
    # An end marker whose target is the begin marker of the next document.
    between = inner[ids_T[inner - 1] == end_id] - 1
    last_targets_N = targets_T[context_tokens - 1 :: context_tokens]
    is_between = (last_targets_N == begin_id) & (rows.ids_NC[:, -1] == end_id)
    if is_between.any():
        at_ends = np.flatnonzero(is_between) * context_tokens + context_tokens - 1
        between = np.concatenate([between, at_ends])
    targets_T[between] = IGNORED_TARGET
    num_targets_N -= np.bincount(between // context_tokens, minlength=num_rows)
    return inner  # type: ignore[no-any-return]


def _ignore_short(rows: Rows, targets_NC: Indices) -> Indices:
    """Ignore targets past the end of rows. Returns the number of targets of each row."""
    num_targets_N: Indices = np.maximum(rows.lengths_N - 1, 0)
    fill_ends(targets_NC, num_targets_N, IGNORED_TARGET)
    return num_targets_N


def _ignore_ends(
    rows: Rows, targets_T: Indices, begin_id: int, end_id: int
) -> tuple[Indices, Indices]:
    """Ignore targets of end markers in rows of whole documents, padding included.

    Returns the starts of documents within rows, and the number of targets of each row.
    """
    num_rows, context_tokens = rows.ids_NC.shape
    ends = np.flatnonzero(rows.ids_NC == end_id)
    starts = ends[targets_T[ends] == begin_id] + 1
    targets_T[ends] = IGNORED_TARGET
    num_ends_N = np.bincount(ends // context_tokens, minlength=num_rows)
    return starts, context_tokens - num_ends_N


def fill_ends(rows_NC: npt.NDArray[Any], first_N: Indices, value: int) -> None:
    """Fill every row from column `first_N` on, in place."""
    width = rows_NC.shape[1]
    for row, first in enumerate(first_N.tolist()):
        if first < width:
            rows_NC[row, first:] = value


@lru_cache(maxsize=8)
def _edges(num_rows: int, context_tokens: int, micro_batch_rows: int) -> tuple[Indices, Indices]:
    """Starts of rows and of batches, each with the end."""
    starts = np.arange(0, num_rows * context_tokens + 1, context_tokens)
    return starts, starts[::micro_batch_rows]


def check_context(context_tokens: int, frame_tokens: int) -> None:
    """Raises ConfigError unless a frame holds a whole number of rows."""
    if context_tokens > frame_tokens or frame_tokens % context_tokens:
        raise ConfigError(
            f"context_tokens is {context_tokens}, which does not divide the shards' frames "
            f"of {frame_tokens} tokens; choose a power of two up to {frame_tokens}"
        )


def _check_examples(
    context_tokens: int, row_tokens: int, stored: TextFormat, direction: Direction, *, both: bool
) -> None:
    """Raises ConfigError or DirectionMismatchError for examples of another row or direction."""
    if context_tokens % row_tokens:
        raise ConfigError(
            f"context_tokens is {context_tokens}, but the examples of the shards are packed into "
            f"rows of {row_tokens} tokens; use {row_tokens} or a multiple, or build the shards "
            f"with `megaback instruct build --context-tokens {context_tokens}`"
        )
    if both:
        raise DirectionMismatchError(
            "the run reads 'both' directions, but the shards hold instruction examples in "
            f"direction {stored.direction.value!r}, which cannot be reversed; use "
            f"data.direction={stored.direction.value}, also to fine-tune a model of both"
        )
    if direction is not stored.direction:
        raise DirectionMismatchError(
            f"the run reads {direction.value!r}, but the shards hold instruction examples in "
            f"direction {stored.direction.value!r}, which cannot be reversed; "
            f"use `megaback instruct build --direction {direction.value}`"
        )


def format_read_as(stored: TextFormat, direction: Direction, *, both: bool = False) -> TextFormat:
    """The text format that a run reads: the stored one, its reverse, or both.

    Raises DirectionMismatchError for `word` shards read against their direction.
    """
    if both and stored.unit is Unit.WORD:
        raise DirectionMismatchError(
            "the run reads 'both' directions, but the shards hold direction "
            f"{stored.direction.value!r} in unit 'word', which cannot be reversed; build them by "
            "`megaback shards build --unit token`"
        )
    if direction is not stored.direction and stored.unit is Unit.WORD:
        raise DirectionMismatchError(
            f"the run reads {direction.value!r}, but the shards hold direction "
            f"{stored.direction.value!r} in unit 'word', which cannot be reversed; "
            f"use `megaback shards build --direction {direction.value}`"
        )
    return TextFormat(direction, stored.unit, stored.tokenizer_sha256, both)
