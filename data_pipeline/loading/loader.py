"""Data loader: the batches of a rank at each step, prepared ahead of time.

The rows of a step are a function of the step: the only state is the number of the next step, so
restarts, ranks and threads change nothing. Threads decode frames and pack rows ahead of the
training step; an error there is raised at the step that needs the rows.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, replace
from queue import Empty, Full, Queue
from threading import Event, Thread

import numpy as np

from data_pipeline.errors import BatchError
from data_pipeline.loading.directions import Flags, are_forward
from data_pipeline.loading.document_index import DocumentIndex
from data_pipeline.loading.mixture import Mixture
from data_pipeline.loading.order import Order
from data_pipeline.loading.row_grid import RowGrid
from data_pipeline.loading.rows import Batch, Indices, RowReader, pack, read_rows

_AHEAD_STEPS = 16
_READY_STEPS = 4
_PLANNED_ROWS = 16_384
_POLL_S = 0.2


@dataclass(frozen=True)
class Stream:
    """One data set of a mixture: its rows and their order."""

    rows: RowReader
    table: RowGrid | DocumentIndex
    order: Order
    """Order within the data set; its batch is about the data set's mean number of rows per step."""
    forward_share: float | None = None
    """Share of the rows that are read forward, for a model of both directions; else None."""


@dataclass(frozen=True)
class _Plan:
    """Places of the rows of one rank and step: arrays of shape (rows,)."""

    stream: Indices
    frame: Indices
    row: Indices
    is_forward: Flags | None

    def first(self, size: int) -> "_Plan":
        """The first `size` rows."""
        is_forward = None if self.is_forward is None else self.is_forward[:size]
        return _Plan(self.stream[:size], self.frame[:size], self.row[:size], is_forward)


class TrainingLoader:
    """The training rows of one rank, with random access by step.

    Consecutive steps are prepared ahead by threads: one packs rows, and all decode frames. With 0
    `threads` a step is prepared when it is read.
    """

    def __init__(
        self,
        streams: Sequence[Stream],
        mixture: Mixture,
        global_batch_rows: int,
        rank: int,
        world_size: int,
        micro_batch_rows: int,
        threads: int = 0,
    ) -> None:
        """Raises BatchError unless ranks and micro-batches divide the batch evenly."""
        if global_batch_rows % (world_size * micro_batch_rows):
            raise BatchError(
                f"{world_size} ranks x {micro_batch_rows} rows per micro-batch do not divide "
                f"global_batch_rows {global_batch_rows}; choose a multiple of "
                f"{world_size * micro_batch_rows}"
            )
        self._streams = streams
        self._mixture = mixture
        self._global_batch_rows = global_batch_rows
        self._rank_rows = global_batch_rows // world_size
        self._first_row = rank * self._rank_rows
        self._micro_batch_rows = micro_batch_rows
        self._threads = threads
        self._ahead: _Prefetcher | None = None
        self._ahead_steps = _AHEAD_STEPS
        for stream in streams:
            order = stream.order
            # A window of frames per lane; some lanes already read their next window.
            rank_lanes = -(-order.lanes // world_size) + 1
            ahead_rows = 0
            if threads > 1:
                ahead_rows = _AHEAD_STEPS * order.global_batch_rows // order.lanes
            stream.rows.keep(rank_lanes + 1, order.window_frames, ahead_rows)
            # At most a frame per lane: more would be replaced before their rows are packed.
            ahead_steps = order.lanes * order.rows_per_frame // order.global_batch_rows
            self._ahead_steps = max(1, min(self._ahead_steps, ahead_steps))

    def at(self, step: int) -> list[Batch]:
        """The rank's micro-batches of a step: its contiguous slice of the global batch.

        Raises ShardCorruptError or SourceUnreadableError for a frame that cannot be read.
        """
        if self._threads == 0:
            return self._assemble(next(self._plans(step)), self._micro_batch_rows)
        if self._ahead is None or self._ahead.next_step != step:
            self.close()
            self._ahead = _Prefetcher(self, step, self._threads)
        try:
            return self._ahead.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Stop the threads."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def places(self, step: int) -> tuple[Indices, Indices, Indices]:
        """Data set, frame and row of each of the rank's rows of a step, without reading them."""
        plan = next(self._plans(step))
        return plan.stream, plan.frame, plan.row

    @property
    def rank_rows(self) -> int:
        """Number of rows of the rank per step."""
        return self._rank_rows

    def slices(self, first: int, stop: int, num_rows: int, stride: int) -> Iterator[Batch]:
        """Yield batches of `num_rows` consecutive rows of the rank.

        The rank's rows are numbered over all steps. Batches begin at row `first` and every `stride`
        rows after it, before `stop`, where the last one is truncated. Raises the errors of `at`.
        """
        within = np.arange(num_rows)
        num_planned = 1
        while first < stop:
            number = first + stride * np.arange(num_planned)[:, None] + within
            step, position = np.divmod(number, self._rank_rows)
            places = self._places(step * self._global_batch_rows + self._first_row + position)
            for start, plan in zip(number[:, 0].tolist(), places, strict=True):
                if start >= stop:
                    return
                size = min(num_rows, stop - start)
                yield self._assemble(plan.first(size), size)[0]
            first += stride * num_planned
            num_planned = min(2 * num_planned, max(1, _PLANNED_ROWS // num_rows))

    def _plans(self, first_step: int) -> Iterator[_Plan]:
        """Places of the rows of each step from `first_step` on; many are computed at once."""
        num_steps = 1
        position = np.arange(self._first_row, self._first_row + self._rank_rows)
        step = first_step
        while True:
            steps = np.arange(step, step + num_steps)
            number = steps[:, None] * self._global_batch_rows + position
            yield from self._places(number)
            step += num_steps
            num_steps = min(2 * num_steps, max(1, _PLANNED_ROWS // self._rank_rows))

    def _places(self, number: Indices) -> Iterator[_Plan]:
        """Places of rows of the mixture: one plan per step of `number`, shape (steps, rows)."""
        stream_of, row_of = self._mixture.deal(number)
        frame, row = np.empty_like(number), np.empty_like(number)
        are_both = self._streams[0].forward_share is not None
        is_forward = np.zeros(number.shape, dtype=np.bool_)
        for index, stream in enumerate(self._streams):
            mine = stream_of == index
            step, position = np.divmod(row_of[mine], stream.order.global_batch_rows)
            places = stream.order.places_of(step, position)
            frame[mine], row[mine] = stream.table.locate(places.frame, places.row)
            if stream.forward_share is not None:
                is_forward[mine] = are_forward(step, position, stream.forward_share)
        for of_step in zip(stream_of, frame, row, is_forward, strict=True):
            plan = _Plan(*of_step)
            yield plan if are_both else replace(plan, is_forward=None)

    def _request(self, plan: _Plan, executor: ThreadPoolExecutor) -> None:
        """Decode the frames of a step ahead."""
        for index, stream in enumerate(self._streams):
            mine = plan.stream == index
            is_forward = None if plan.is_forward is None else plan.is_forward[mine]
            frames = stream.rows.frames_of(plan.frame[mine], plan.row[mine], is_forward)
            stream.rows.frames.request(dict.fromkeys(frames.tolist()), executor)

    def _assemble(self, plan: _Plan, micro_batch_rows: int) -> list[Batch]:
        readers = [stream.rows for stream in self._streams]
        rows = read_rows(readers, plan.stream, plan.frame, plan.row, plan.is_forward)
        return pack(rows, readers[0].begin_id, readers[0].end_id, micro_batch_rows)


class _Prefetcher:
    """Threads that prepare the batches of consecutive steps from a given one on."""

    def __init__(self, batches: TrainingLoader, first_step: int, threads: int) -> None:
        self.next_step = first_step
        self._batches = batches
        self._ready: Queue[list[Batch] | BaseException] = Queue(_READY_STEPS)
        self._stop = Event()
        self._decoders = ThreadPoolExecutor(threads - 1, "decode") if threads > 1 else None
        self._thread = Thread(target=self._run, args=(first_step,), name="pack", daemon=True)
        self._thread.start()

    def take(self) -> list[Batch]:
        """The batches of the next step. Raises the error of preparing them."""
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        self.next_step += 1
        return ready

    def close(self) -> None:
        self._stop.set()
        with suppress(Empty):  # the thread may be waiting to put one more
            while True:
                self._ready.get_nowait()
        self._thread.join()
        if self._decoders is not None:
            self._decoders.shutdown(cancel_futures=True)

    def _run(self, first_step: int) -> None:
        try:
            plans = self._batches._plans(first_step)
            waiting: deque[_Plan] = deque()
            while not self._stop.is_set():
                while self._decoders is not None and len(waiting) < self._batches._ahead_steps:
                    waiting.append(next(plans))
                    self._batches._request(waiting[-1], self._decoders)
                if not waiting:
                    waiting.append(next(plans))
                batches = self._batches
                self._put(batches._assemble(waiting.popleft(), batches._micro_batch_rows))
        except BaseException as error:  # noqa: BLE001 - raised in the thread that takes
            self._put(error)

    def _put(self, ready: list[Batch] | BaseException) -> None:
        while not self._stop.is_set():
            with suppress(Full):
                self._ready.put(ready, timeout=_POLL_S)
                return


class SequentialRows:
    """Every row of a split once, in stored order, dealt to the ranks: the val set.

    With `max_rows`, only that many of all rows, at equal distances: the same for any number of
    ranks.

    Each rank in turn gets `micro_batch_rows` rows. All get the same number: each data set is padded
    with rows without targets, because sharded ranks must run every forward pass together.

    Rows of a model of both directions are read backward, then forward, unless `in_one_direction`,
    that of the readers' text format.
    """

    def __init__(
        self,
        readers: Sequence[RowReader],
        rank: int,
        world_size: int,
        micro_batch_rows: int,
        *,
        in_one_direction: bool = False,
        max_rows: int | None = None,
    ) -> None:
        self._readers = readers
        places = [_places(rows) for rows in readers]
        self.rows_of_split = sum(map(len, places))
        """Number of rows of the whole split, of all ranks."""
        self.rows_read = min(self.rows_of_split, max_rows or self.rows_of_split)
        """Number of these that are read, once per direction."""
        tables = [
            _dealt(place, is_read, rank, world_size, micro_batch_rows)
            for place, is_read in zip(places, self._are_read(list(map(len, places))), strict=True)
        ]
        self._reader = np.repeat(np.arange(len(readers)), [len(table) for table in tables])
        self._place = np.concatenate(tables)
        self._is_forward: Flags | None = None
        if readers[0].text_format.both and not in_one_direction:
            self._is_forward = np.repeat([False, True], len(self._reader))
            self._reader, self._place = np.tile(self._reader, 2), np.tile(self._place, (2, 1))

    def _are_read(self, lengths: list[int]) -> list[Flags]:
        """Flags of the rows of each data set that are read."""
        number = np.arange(self.rows_of_split + 1) * self.rows_read // max(1, self.rows_of_split)
        return np.split(np.diff(number) > 0, np.cumsum(lengths)[:-1])

    @property
    def num_rows(self) -> int:
        """Number of rows of the rank."""
        return len(self._reader)

    def slices(self, first: int, stop: int, num_rows: int, stride: int) -> Iterator[Batch]:
        """As `TrainingLoader.slices`. Raises the errors of frames."""
        for start in range(first, stop, stride):
            part = slice(start, min(start + num_rows, stop))
            is_forward = None if self._is_forward is None else self._is_forward[part]
            frame, row = self._place[part].T
            rows = read_rows(self._readers, self._reader[part], frame, row, is_forward)
            begin_id, end_id = self._readers[0].begin_id, self._readers[0].end_id
            yield from pack(rows, begin_id, end_id, len(rows.lengths_N))


def _places(rows: RowReader) -> Indices:
    """Frame and row of each row of a split: shape (rows, 2)."""
    frames = rows.frames
    count = -(-frames.num_tokens(np.arange(frames.num_frames)) // rows.context_tokens)
    row = np.arange(count.sum()) - np.repeat(np.cumsum(count) - count, count)
    return np.stack([np.repeat(np.arange(frames.num_frames), count), row], axis=1)


def _dealt(
    place: Indices, is_read: Flags, rank: int, world_size: int, micro_batch_rows: int
) -> Indices:
    """Frame and row of each of a rank's rows: shape (rows, 2)."""
    of_nothing = place[-1:] + np.array([0, 1])
    place = place[is_read]
    missing = -len(place) % (world_size * micro_batch_rows)
    place = np.concatenate([place, of_nothing.repeat(missing, axis=0)])
    return place.reshape(-1, world_size, micro_batch_rows, 2)[:, rank].reshape(-1, 2)


def sequential_batches(
    rows: RowReader, rank: int, world_size: int, micro_batch_rows: int
) -> Iterator[Batch]:
    """Yield a rank's batches of the `SequentialRows` of one data set, in one direction."""
    dealt = SequentialRows([rows], rank, world_size, micro_batch_rows, in_one_direction=True)
    return dealt.slices(0, dealt.num_rows, micro_batch_rows, micro_batch_rows)
