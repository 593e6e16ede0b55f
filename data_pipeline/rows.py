"""From places of rows to the arrays that a training step takes.

A row is `context_tokens` ids of a frame and their targets. Documents are packed one after another:
attention starts afresh at every begin marker and at every row (`cu_seqlens`), positions likewise.
A target is ignored where there is nothing to learn: past a frame's end, and from one document's
end marker to the next one's begin marker.

Direction is a way of reading: a run may read `token` shards against their stored direction. Each
row's window of `context_tokens + 1` ids is then read from its other end with begin and end markers
exchanged, so that both directions see the same windows in the same steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data_pipeline.errors import ConfigError, DirectionMismatchError
from data_pipeline.frame_store import FrameStore
from data_pipeline.text import Direction, TextFormat, Unit

IGNORED_TARGET = -100

Indices = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """Packed rows. T is rows x context_tokens.

    ids_T, positions_T and targets_T are int64 of shape (T,); cu_seqlens is int32 of shape
    (segments + 1,), from 0 to T: where attention starts afresh.
    """

    ids_T: npt.NDArray[np.int64]
    targets_T: npt.NDArray[np.int64]
    positions_T: npt.NDArray[np.int64]
    cu_seqlens: npt.NDArray[np.int32]
    num_targets: int
    num_skipped_rows: int
    """Rows of frames that could not be read and were left out: they have no targets."""


class RowReader:
    """Reads rows of one data set, in the direction in which the run reads."""

    def __init__(self, frames: FrameStore, context_tokens: int, direction: Direction) -> None:
        """Raises ConfigError or DirectionMismatchError when these shards cannot be read so."""
        manifest = frames.manifest
        check_context(context_tokens, manifest.frame_tokens)
        self.text_format = format_read_as(manifest.text_format, direction)
        self.frames = frames
        self.context_tokens = context_tokens
        self.begin_id = manifest.begin_id
        self.end_id = manifest.end_id
        self.is_flipped = direction is not manifest.text_format.direction

    def window(self, frame: int, row: int) -> Indices:
        """The ids of a row and the one after it, in reading order: at most context_tokens + 1."""
        windows_NC, lengths_N = read_windows([self], *np.array([[0], [frame], [row]]))
        return windows_NC[0, : max(lengths_N[0], 0)].astype(np.int64)

    def batch(self, frame: Indices, row: Indices) -> Batch:
        """Pack the rows at these places. A row past the end of a short frame has no targets."""
        windows_NC, lengths_N = read_windows([self], np.zeros_like(frame), frame, row)
        (batch,) = pack(windows_NC, lengths_N, self.begin_id, self.end_id, len(frame))
        return batch


def read_windows(
    readers: Sequence[RowReader], reader: Indices, frame: Indices, row: Indices
) -> tuple[npt.NDArray[np.unsignedinteger[Any]], Indices]:
    """The windows of rows in reading order, shape (rows, context_tokens + 1), and their lengths.

    Row i lies in a frame of readers[reader[i]]; all readers read the same format. Short windows are
    filled up with end markers, which attend to what is before them and which nothing attends to.
    A row past the end of a short frame has length 0, one of a frame that was left out -1. Raises
    the errors of the frames.
    """
    first = readers[0]
    size = first.context_tokens + 1
    padding = np.full(size, first.end_id, dtype=f"<u{first.frames.manifest.id_bytes}")
    lengths_N = np.full(len(frame), size, dtype=np.int64)
    parts = []
    stores = [one.frames.frame for one in readers]
    places = zip(
        reader.tolist(), frame.tolist(), (row * first.context_tokens).tolist(), strict=True
    )
    for number, (store, of_frame, start) in enumerate(places):
        ids = stores[store](of_frame)
        window = ids[start : start + size]
        if first.is_flipped:
            window = window[::-1]
        parts.append(window)
        if len(window) < size:
            lengths_N[number] = len(window) if len(ids) else -1
            parts.append(padding[len(window) :])
    windows_NC = np.empty((len(frame), size), dtype=padding.dtype)
    np.concatenate(parts, out=windows_NC.reshape(-1))
    if first.is_flipped:
        _exchange_markers(windows_NC, lengths_N, first.begin_id, first.end_id)
    return windows_NC, lengths_N


def _exchange_markers(
    windows_NC: npt.NDArray[np.unsignedinteger[Any]], lengths_N: Indices, begin_id: int, end_id: int
) -> None:
    begins, ends = windows_NC == begin_id, windows_NC == end_id
    windows_NC[begins], windows_NC[ends] = end_id, begin_id
    for number in np.flatnonzero(lengths_N < windows_NC.shape[1]).tolist():
        windows_NC[number, max(lengths_N[number], 0) :] = end_id


def pack(
    windows_NC: npt.NDArray[np.unsignedinteger[Any]],
    lengths_N: Indices,
    begin_id: int,
    end_id: int,
    micro_batch_rows: int,
) -> list[Batch]:
    """Batches of `micro_batch_rows` rows each, from windows of shape (rows, context_tokens + 1).

    Of row i, the first lengths_N[i] ids are there, and the rest is end markers.
    """
    num_rows, context_tokens = windows_NC.shape[0], windows_NC.shape[1] - 1
    total = num_rows * context_tokens
    # One block: three would be given back to the system, and faulted in again, at every step.
    ids_T, targets_T, positions_T = np.empty((3, total), dtype=np.int64)
    ids_T.reshape(num_rows, context_tokens)[:] = windows_NC[:, :-1]
    targets_NC = targets_T.reshape(num_rows, context_tokens)
    targets_NC[:] = windows_NC[:, 1:]
    num_targets_N = np.maximum(lengths_N - 1, 0)
    for number in np.flatnonzero(lengths_N <= context_tokens).tolist():
        targets_NC[number, num_targets_N[number] :] = IGNORED_TARGET

    found = np.flatnonzero(windows_NC.reshape(-1) == begin_id)
    row, column = np.divmod(found, context_tokens + 1)
    place = row * context_tokens + column
    # Between documents: the end marker of one, whose target is the begin marker of the next.
    is_between = (column > 0) & (windows_NC.reshape(-1)[found - 1] == end_id)
    targets_T[place[is_between] - 1] = IGNORED_TARGET
    num_targets_N -= np.bincount(row[is_between], minlength=num_rows)

    counted = np.arange(context_tokens)
    positions_T.reshape(num_rows, context_tokens)[:] = counted
    inner = place[(column > 0) & (column < context_tokens)]
    bounds = np.sort(np.concatenate([np.arange(0, total + 1, context_tokens), inner]))
    stops = bounds[np.searchsorted(bounds, inner) + 1]
    for start, stop in zip(inner.tolist(), stops.tolist(), strict=True):
        positions_T[start:stop] = counted[: stop - start]

    tokens = micro_batch_rows * context_tokens
    targets_of = num_targets_N.reshape(-1, micro_batch_rows).sum(axis=1).tolist()
    skipped_of = (lengths_N < 0).reshape(-1, micro_batch_rows).sum(axis=1).tolist()
    # Every batch begins where a row does, so that the next one's first start is its end.
    first_of = np.searchsorted(bounds, np.arange(0, total + 1, tokens)).tolist()
    bounds = bounds.astype(np.int32)
    return [
        Batch(
            ids_T[number * tokens : (number + 1) * tokens],
            targets_T[number * tokens : (number + 1) * tokens],
            positions_T[number * tokens : (number + 1) * tokens],
            bounds[first_of[number] : first_of[number + 1] + 1] - np.int32(number * tokens),
            num_targets,
            num_skipped_rows,
        )
        for number, (num_targets, num_skipped_rows) in enumerate(
            zip(targets_of, skipped_of, strict=True)
        )
    ]


def check_context(context_tokens: int, frame_tokens: int) -> None:
    """Raises ConfigError unless a frame holds a whole number of rows."""
    if context_tokens > frame_tokens or frame_tokens % context_tokens:
        raise ConfigError(
            f"batch.context_tokens is {context_tokens}, which does not divide the shards' frames "
            f"of {frame_tokens} tokens; choose a power of two up to {frame_tokens}"
        )


def format_read_as(stored: TextFormat, direction: Direction) -> TextFormat:
    """The format of what a run reads: the stored one, or its mirror image.

    Raises DirectionMismatchError for `word` shards read against their direction.
    """
    if direction is not stored.direction and stored.unit is Unit.WORD:
        raise DirectionMismatchError(
            f"the run reads {direction.value!r}, but the shards hold direction "
            f"{stored.direction.value!r} in unit 'word', which cannot be flipped; "
            f"build shards with --direction {direction.value}"
        )
    return TextFormat(direction, stored.unit, stored.tokenizer_sha256)
