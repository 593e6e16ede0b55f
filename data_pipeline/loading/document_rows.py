"""Reader of rows of whole documents: every row begins where documents begin, in reading order.

Several documents share a row, and none crosses its end; the rest is padding without targets. A
document that is longer than a row is read from its beginning in reading order, up to
`context_tokens` + 1 tokens, the last of which is only a target: a run against the stored direction
reads the other end of it. Rows of both directions hold the same documents.
"""

from collections import deque
from dataclasses import dataclass
from threading import Lock

import numpy as np

from data_pipeline.loading.directions import Flags, exchange
from data_pipeline.loading.document_index import DocumentIndex, Indices
from data_pipeline.loading.frame_store import FrameStore
from data_pipeline.loading.rows import RowReader, Rows, fill_ends
from data_pipeline.text.codec import Direction

_MAX_GROUP_SPAN = 4
"""Limit of the frames that are kept for a group, relative to those that its rows would fill."""


@dataclass(frozen=True)
class _Spans:
    """The spans of a group's rows, in stored order."""

    rows: Indices
    """Number of spans of each row, the span after its last, and its tokens without padding: shape
    (3, rows)."""
    places: Indices
    """Frame, and first and last (exclusive) id of each span: shape (3, spans)."""


class _Groups:
    """The spans of the groups that were read last, in arrays over all of them."""

    def __init__(self, num_keys: int, num_rows: int) -> None:
        """A key is a group in one direction."""
        # Of each key, 1 + its slot; 0 without one.
        self._slot_after = np.zeros(num_keys, dtype=np.int64)
        self._oldest: deque[int] = deque()
        self._rows = np.empty((3, 0, num_rows), dtype=np.int64)
        self._places = np.empty((3, 0, 0), dtype=np.int64)

    def make_room(self, num_groups: int, num_spans: int = 0) -> None:
        """Make room for at least as many groups, of at least as many spans each."""
        _, old_groups, old_spans = self._places.shape
        groups, spans = max(num_groups, old_groups), max(num_spans, old_spans)
        if (groups, spans) != (old_groups, old_spans):
            self._rows = _enlarged(self._rows, (3, groups, self._rows.shape[2]))
            self._places = _enlarged(self._places, (3, groups, spans))

    def add(self, key: int, spans: _Spans) -> None:
        """Add a group, in place of the oldest one if there is no room."""
        num_spans = spans.places.shape[1]
        self.make_room(0, num_spans)
        slot = len(self._oldest)
        if slot == self._rows.shape[1]:
            oldest = self._oldest.popleft()
            slot = int(self._slot_after[oldest]) - 1
            self._slot_after[oldest] = 0
        self._oldest.append(key)
        self._slot_after[key] = slot + 1
        self._rows[:, slot] = spans.rows
        self._places[:, slot, :num_spans] = spans.places

    def missing(self, keys: Indices) -> list[int]:
        slot_after = self._slot_after[keys]
        if slot_after.all():  # the usual case
            return []
        missing: list[int] = keys[slot_after == 0].tolist()
        return list(dict.fromkeys(missing))

    def of(self, keys: Indices, row: Indices) -> tuple[Indices, Indices, Indices]:
        """Places of the spans of rows; for each row the end of its spans, and its tokens."""
        slot = self._slot_after[keys] - 1
        _, num_rows = self._rows.shape[1:]
        number, last, tokens = self._rows.reshape(3, -1)[:, slot * num_rows + row]
        ends = np.cumsum(number)
        spans = np.repeat(slot * self._places.shape[2] + last - ends, number)
        spans += np.arange(len(spans))
        return self._places.reshape(3, -1)[:, spans], ends, tokens


def _enlarged(array: Indices, shape: tuple[int, ...]) -> Indices:
    larger = np.empty(shape, dtype=array.dtype)
    larger[tuple(map(slice, array.shape))] = array
    return larger


class DocumentRowReader(RowReader):
    """Reads rows of whole documents of one data set: `frame` is the number of a group."""

    def __init__(
        self, frames: FrameStore, index: DocumentIndex, direction: Direction, *, both: bool = False
    ) -> None:
        """As RowReader, which raises the same errors."""
        super().__init__(frames, index.totals.context_tokens, direction, both=both)
        self.index = index
        self._shard_ends = np.cumsum(frames.shard_tokens)
        frame_tokens = frames.manifest.frame_tokens
        self._missing = np.cumsum(-frames.shard_tokens % frame_tokens)
        self._groups = _Groups((1 + both) * index.totals.groups, index.totals.rows_per_group)
        self._lock = Lock()

    def keep(self, windows: int, window_frames: int, ahead_rows: int = 0) -> None:
        totals, frame_tokens = self.index.totals, self.frames.manifest.frame_tokens
        filled = totals.rows_per_group * totals.context_tokens / frame_tokens
        spanned = totals.tokens / totals.groups / frame_tokens
        group_frames = int(min(spanned, _MAX_GROUP_SPAN * filled)) + 2
        # Windows of all lanes end at the same step. A row seldom needs more than two frames.
        ahead_frames = min(2 + 2 * ahead_rows, 2 + group_frames)
        self.frames.keep(windows * (window_frames * group_frames + ahead_frames))
        self._groups.make_room((1 + self.text_format.both) * windows * (window_frames + 1))

    def frames_of(self, frame: Indices, row: Indices, is_forward_N: Flags | None = None) -> Indices:
        is_forward_N = self._directions(len(frame), is_forward_N)
        spans, _, _ = self._spans_of(frame, row, is_forward_N)
        frames: Indices = spans[0]
        return frames

    def read(self, frame: Indices, row: Indices, is_forward_N: Flags | None = None) -> Rows:
        is_forward_N = self._directions(len(frame), is_forward_N)
        spans, ends, lengths_N = self._spans_of(frame, row, is_forward_N)
        window_NC = self.frames.spans(*spans).reshape(len(frame), self.context_tokens + 1)
        if is_forward_N is not None:
            is_flipped_N = self.are_flipped(is_forward_N)
            flipped_NC = window_NC[is_flipped_N][:, ::-1]
            exchange(flipped_NC, self.begin_id, self.end_id)
            window_NC[is_flipped_N] = flipped_NC
        elif self.is_flipped:
            window_NC = window_NC[:, ::-1]
            exchange(window_NC, self.begin_id, self.end_id)
        if self.frames.skipped_frames:
            is_bad = self.frames.is_skipped(spans[0])
            is_bad_N = np.logical_or.reduceat(is_bad, [0, *ends[:-1]])
            is_bad_N &= lengths_N > 0
            window_NC[is_bad_N] = self.end_id
            lengths_N[is_bad_N] = -1
        fill_ends(window_NC, lengths_N, self.end_id)
        return Rows(
            window_NC[:, :-1],
            window_NC[:, -1],
            lengths_N,
            is_forward_N=is_forward_N,
            are_whole=True,
        )

    def _directions(self, num_rows: int, is_forward_N: Flags | None) -> Flags | None:
        """Flags of the rows that are read forward, for a model of both directions; else None."""
        return self.are_forward(num_rows, is_forward_N) if self.text_format.both else None

    def _spans_of(
        self, frame: Indices, row: Indices, is_forward_N: Flags | None
    ) -> tuple[Indices, Indices, Indices]:
        """As `_Groups.of`. The spans of every row have `context_tokens` + 1 tokens."""
        num_groups, keys = self.index.totals.groups, frame
        if is_forward_N is not None:
            keys = frame + num_groups * self.are_flipped(is_forward_N)
        with self._lock:
            missing = self._groups.missing(keys)
            if missing:
                self._groups.make_room(len(np.unique(keys)))
            while missing:
                for key in missing:
                    are_flipped, number = divmod(key, num_groups)
                    is_flipped = self.is_flipped if is_forward_N is None else bool(are_flipped)
                    self._groups.add(key, self._spans(number, is_flipped=is_flipped))
                # One that was there may have been replaced.
                missing = self._groups.missing(keys)
            return self._groups.of(keys, row)

    def _spans(self, number: int, *, is_flipped: bool) -> _Spans:
        """The spans of a group, read from one end of each document."""
        group, context_tokens = self.index.group(number), self.context_tokens
        manifest = self.frames.manifest
        num_rows = self.index.totals.rows_per_group
        ends = int(self.index.first_token[number]) + np.cumsum(group.lengths)
        tokens = np.minimum(group.lengths, context_tokens + 1)
        starts = ends - tokens if is_flipped else ends - group.lengths
        # Frames are numbered as if the last one of a shard were whole.
        shard = np.searchsorted(self._shard_ends, ends - group.lengths, side="right")
        starts += np.concatenate([[0], self._missing])[shard]

        # Stored order: flipped rows end with their first document, and begin with the padding.
        order = np.argsort(group.rows, kind="stable")
        row, starts, stops = _cut_at_frames(
            group.rows[order], starts[order], (starts + tokens)[order], manifest.frame_tokens
        )
        frames = starts // manifest.frame_tokens
        before = frames * manifest.frame_tokens
        places = np.stack([frames, starts - before, stops - before], axis=1)

        filled = np.bincount(group.rows, tokens, num_rows).astype(np.int64)
        row, places = _widened(
            row, places, context_tokens + 1 - filled, manifest.frame_tokens, is_flipped=is_flipped
        )
        bounds = np.searchsorted(row, np.arange(num_rows + 1))
        return _Spans(np.stack([np.diff(bounds), bounds[1:], filled]), places.T)


def _cut_at_frames(
    row: Indices, starts: Indices, stops: Indices, frame_tokens: int
) -> tuple[Indices, Indices, Indices]:
    """The same spans, cut where they cross a frame's end."""
    frame = starts // frame_tokens
    parts = (stops - 1) // frame_tokens - frame + 1
    number = np.arange(parts.sum()) - np.repeat(np.cumsum(parts) - parts, parts)
    first = (np.repeat(frame, parts) + number) * frame_tokens
    return (
        np.repeat(row, parts),
        np.maximum(np.repeat(starts, parts), first),
        np.minimum(np.repeat(stops, parts), first + frame_tokens),
    )


def _widened(
    row: Indices, places: Indices, missing: Indices, frame_tokens: int, *, is_flipped: bool
) -> tuple[Indices, Indices]:
    """Spans of rows with as many more ids as are `missing`, whatever they are.

    They are after the last span of a row or, flipped, before its first: the ids beside it in its
    frame if there are enough, else a span of their own.
    """
    places = places.copy()
    num_rows = len(missing)
    edge = np.searchsorted(row, np.arange(num_rows), side="left" if is_flipped else "right")
    edge = np.clip(edge if is_flipped else edge - 1, 0, len(row) - 1)
    has_spans = np.bincount(row, minlength=num_rows) > 0
    beside = places[edge, 1] if is_flipped else frame_tokens - places[edge, 2]
    is_beside = has_spans & (missing <= beside)
    if is_flipped:
        places[edge[is_beside], 1] -= missing[is_beside]
    else:
        places[edge[is_beside], 2] += missing[is_beside]

    apart = np.flatnonzero(~is_beside)
    frame = places[np.where(has_spans, edge, 0), 0][apart]
    # Two spans, as an empty row may need one id more than a frame has.
    one = np.minimum(missing[apart], 1)
    zero = np.zeros_like(one)
    more = np.concatenate(
        [
            np.stack([frame, zero, missing[apart] - one], axis=1),
            np.stack([frame, zero, one], axis=1),
        ]
    )
    more_row = np.concatenate([apart, apart])
    is_more = np.arange(len(row) + len(more)) >= len(row)
    row = np.concatenate([row, more_row])
    order = np.argsort(2 * row + (is_more ^ is_flipped), kind="stable")
    return row[order], np.concatenate([places, more])[order]
