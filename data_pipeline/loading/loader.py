"""The batches of a run: the rows that a rank gets at a step, as arrays, made ahead of time.

The rows of a step are a function of the step. State is the number of the step that comes next, so
that restarts, ranks and threads change nothing. Frames are decoded and rows packed by threads that
run ahead of the training step; whatever goes wrong there is raised at the step that needs it.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, Full, Queue
from threading import Event, Thread

import numpy as np

from data_pipeline.errors import BatchError
from data_pipeline.loading.frame_store import FrameStore
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
    """One data set of a mixture: its rows, and the order in which they come."""

    rows: RowReader
    table: RowGrid
    order: Order
    """Of the data set alone: its batch is the data set's usual number of rows a step."""


@dataclass(frozen=True)
class _Plan:
    """Where the rows of one rank and step lie: arrays of shape (rows,)."""

    stream: Indices
    frame: Indices
    row: Indices


class TrainingLoader:
    """The training rows of one rank, step by step: any step can be asked for.

    Steps that follow one another come from threads that run ahead: one decodes frames and packs
    rows, the others decode for it. With 0 `threads` everything happens when it is asked for.
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
                f"{world_size} ranks x {micro_batch_rows} rows a micro-batch do not divide "
                f"batch.global_batch_rows {global_batch_rows}"
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
            # A window of frames for each lane; some lanes are on their way to their next one.
            rank_lanes = -(-order.lanes // world_size) + 1
            stream.rows.frames.keep((rank_lanes + 1) * (order.window_frames + 2))
            # At most a frame of each lane: others would be dropped before their rows are packed.
            ahead_steps = order.lanes * order.rows_per_frame // order.global_batch_rows
            self._ahead_steps = max(1, min(self._ahead_steps, ahead_steps))

    def at(self, step: int) -> list[Batch]:
        """The rank's micro-batches of a step: its contiguous slice of the global batch.

        Raises ShardCorruptError or SourceUnreadableError for a frame that cannot be read.
        """
        if self._threads == 0:
            return self._assemble(next(self._plans(step)))
        if self._ahead is None or self._ahead.next_step != step:
            self.close()
            self._ahead = _Prefetcher(self, step, self._threads)
        try:
            return self._ahead.take()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End the threads."""
        if self._ahead is not None:
            self._ahead.close()
            self._ahead = None

    def _plans(self, first_step: int) -> Iterator[_Plan]:
        """Where the rows of each step from the first one on lie; many are worked out at a time."""
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
        """Where rows of the mixture lie: `number` has shape (steps, rows), a plan is of a step."""
        stream_of, row_of = self._mixture.deal(number)
        frame, row = np.empty_like(number), np.empty_like(number)
        for index, stream in enumerate(self._streams):
            mine = stream_of == index
            step, position = np.divmod(row_of[mine], stream.order.global_batch_rows)
            places = stream.order.places_of(step, position)
            frame[mine], row[mine] = stream.table.locate(places.frame, places.row)
        for of_step in zip(stream_of, frame, row, strict=True):
            yield _Plan(*of_step)

    def _request(self, plan: _Plan, executor: ThreadPoolExecutor) -> None:
        """Have the frames of a step decoded."""
        for index, stream in enumerate(self._streams):
            frames = dict.fromkeys(plan.frame[plan.stream == index].tolist())
            stream.rows.frames.request(frames, executor)

    def _assemble(self, plan: _Plan) -> list[Batch]:
        readers = [stream.rows for stream in self._streams]
        rows = read_rows(readers, plan.stream, plan.frame, plan.row)
        return pack(rows, readers[0].begin_id, readers[0].end_id, self._micro_batch_rows)


class _Prefetcher:
    """Threads that make the batches of one step after another, from a given one on."""

    def __init__(self, batches: TrainingLoader, first_step: int, threads: int) -> None:
        self.next_step = first_step
        self._batches = batches
        self._ready: Queue[list[Batch] | BaseException] = Queue(_READY_STEPS)
        self._stop = Event()
        self._decoders = ThreadPoolExecutor(threads - 1, "decode") if threads > 1 else None
        self._thread = Thread(target=self._run, args=(first_step,), name="pack", daemon=True)
        self._thread.start()

    def take(self) -> list[Batch]:
        """The batches of the next step, or the error that came of them."""
        ready = self._ready.get()
        if isinstance(ready, BaseException):
            raise ready
        self.next_step += 1
        return ready

    def close(self) -> None:
        self._stop.set()
        with suppress(Empty):  # it may be waiting for room, for one more
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
                self._put(self._batches._assemble(waiting.popleft()))
        except BaseException as error:  # noqa: BLE001 - it belongs to the thread that asks
            self._put(error)

    def _put(self, ready: list[Batch] | BaseException) -> None:
        while not self._stop.is_set():
            with suppress(Full):
                self._ready.put(ready, timeout=_POLL_S)
                return


def sequential_batches(
    frames: FrameStore, rows: RowReader, rank: int, world_size: int, micro_batch_rows: int
) -> Iterator[Batch]:
    """Every row of a split once, in stored order, dealt to the ranks: the val set.

    Every rank gets the same number of batches of the same shape, filled up with rows that have no
    targets, because sharded ranks must take every forward pass together.
    """
    num_rows = -(-frames.num_tokens(np.arange(frames.num_frames)) // rows.context_tokens)
    place = [(frame, row) for frame, count in enumerate(num_rows.tolist()) for row in range(count)]
    frame_of_nothing, row_of_nothing = place[-1][0], place[-1][1] + 1
    group_rows = world_size * micro_batch_rows
    place += [(frame_of_nothing, row_of_nothing)] * (-len(place) % group_rows)
    table = np.array(place, dtype=np.int64)
    for start in range(rank * micro_batch_rows, len(table), group_rows):
        chosen = table[start : start + micro_batch_rows]
        yield rows.batch(chosen[:, 0], chosen[:, 1])
