"""The compute thread of the server: one continuous batch per model, and other work in steps.

All computation runs in this one thread; requests are handled on the event loop. Requests whose
samples wait take turns when a slot is free. Prompts and other work are processed in time slices,
between which every sample gets a token: no work delays others by more than a step and a time slice,
and canceled work ends within the same time.
"""

import asyncio
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megaback.inference.batch import ContinuousBatch, ReadingError, Sample, Step
from megaback.inference.steps import Steps
from tools.serving.prometheus import Metrics

_log = logging.getLogger("megaback.serve")
_Result = TypeVar("_Result")
_SLICE_S = 0.05
"""Time slice in seconds of prompts, and of other work, between two tokens of the samples."""


class EngineFullError(Exception):
    """Raised when the queue of waiting samples is full."""


@dataclass(eq=False)
class Writing:
    """A sample of a request, and the callback that gets each Step or the error."""

    model: str
    sample: Sample
    put: Callable[["Step | Exception"], None]
    """Called on the event loop."""
    is_over: bool = field(default=False, init=False)


_Events = list[tuple[Writing, "Step | Exception"]]


@dataclass(frozen=True)
class _Task:
    """Other work, and the future of its result."""

    steps: Steps[Any]
    future: "Future[Any]"

    def has_more_after_a_step(self) -> bool:
        if self.future.cancelled():
            self.steps.close()
            return False
        try:
            next(self.steps)
        except StopIteration as end:
            if self.future.set_running_or_notify_cancel():
                self.future.set_result(end.value)
        except Exception as error:  # noqa: BLE001 - raised where it is waited for
            if self.future.set_running_or_notify_cancel():
                self.future.set_exception(error)
        else:
            return True
        return False


class Engine:
    """Worker thread that runs the batches of some models."""

    def __init__(
        self, batches: Mapping[str, ContinuousBatch], max_waiting: int, metrics: Metrics
    ) -> None:
        self._batches, self._max_waiting, self._metrics = dict(batches), max_waiting, metrics
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[deque[Writing]]] = {name: deque() for name in batches}
        self._running: dict[Sample, Writing] = {}
        self._given_up: list[Writing] = []
        self._tasks: deque[_Task] = deque()
        self._is_closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="megaback-engine", daemon=True)

    def start(self) -> None:
        """Start the thread. Must be called on the event loop that gets its events."""
        self._loop = asyncio.get_running_loop()
        for name in self._batches:
            self._metrics.rows(name, running=0, waiting=0)
        self._thread.start()

    def close(self) -> None:
        """Stop the thread and all its work."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def write(self, writings: list[Writing]) -> None:
        """Queue the samples of one request.

        Raises EngineFullError, and then takes none of them.
        """
        if not writings:
            return
        with self._changed:
            num_waiting = sum(map(self._num_waiting, self._waiting))
            if num_waiting and num_waiting + len(writings) > self._max_waiting:
                raise EngineFullError(f"{num_waiting} samples are waiting already")
            self._waiting[writings[0].model].append(deque(writings))
            self._changed.notify()

    def give_up(self, writings: list[Writing]) -> None:
        """Cancel these samples; finished ones are ignored."""
        with self._changed:
            self._given_up += [writing for writing in writings if not writing.is_over]
            self._changed.notify()

    def compute(self, steps: "Steps[_Result]") -> "Future[_Result]":
        """Queue other work, which ends when its future is canceled."""
        future: Future[_Result] = Future()
        with self._changed:
            self._tasks.append(_Task(steps, future))
            self._changed.notify()
        return future

    def _run(self) -> None:
        while not self._is_closing:
            try:
                self._turn()
            except Exception as error:  # noqa: BLE001 - the server continues
                self._fail(_logged(error))
        for task in self._tasks:
            task.future.cancel()
            task.steps.close()
        for batch in self._batches.values():
            batch.clear()

    def _turn(self) -> None:
        """One token of every sample, then a time slice of other work."""
        with self._changed:
            self._changed.wait_for(self._has_work)
            if self._is_closing:
                return
            given_up, self._given_up = self._given_up, []
            begun = self._next_to_begin(given_up)
            num_waiting = {name: self._num_waiting(name) for name in self._waiting}
        for writing in given_up:
            self._running.pop(writing.sample, None)
            self._batches[writing.model].remove(writing.sample)
        events: _Events = []
        for writing in begun:
            self._begin(writing, events)
        for name, batch in self._batches.items():
            self._advance(name, batch, events)
            self._metrics.rows(name, running=len(batch), waiting=num_waiting[name])
        self._send(events)
        self._work()

    def _fail(self, error: Exception) -> None:
        """Drop all running samples and report the error to each."""
        failed, self._running = list(self._running.values()), {}
        for batch in self._batches.values():
            batch.clear()
        self._send([(writing, error) for writing in failed])

    def _has_work(self) -> bool:
        return bool(
            self._is_closing
            or self._given_up
            or self._tasks
            or self._running
            or any(self._waiting.values())
        )

    def _num_waiting(self, model: str) -> int:
        return sum(map(len, self._waiting[model]))

    def _next_to_begin(self, given_up: list[Writing]) -> list[Writing]:
        """Samples that fit into free slots, round-robin over requests.

        Samples canceled while waiting are dropped.
        """
        begun: list[Writing] = []
        leaving = set(given_up)
        for name, requests in self._waiting.items():
            if leaving:
                kept = [deque(one for one in waiting if one not in leaving) for waiting in requests]
                requests.clear()
                requests.extend(waiting for waiting in kept if waiting)
            free = self._batches[name].num_slots - len(self._batches[name])
            while requests and free > 0:
                waiting = requests.popleft()
                begun.append(waiting.popleft())
                free -= 1
                if waiting:
                    requests.append(waiting)
        return begun

    def _begin(self, writing: Writing, events: _Events) -> None:
        try:
            self._batches[writing.model].add(writing.sample)
        except Exception as error:  # noqa: BLE001 - sent to the request of the sample
            events.append((writing, _logged(error)))
            return
        self._running[writing.sample] = writing
        self._metrics.began(writing.model, len(writing.sample.prompt.ids))

    def _advance(self, name: str, batch: ContinuousBatch, events: _Events) -> None:
        """Read waiting prompts for a time slice, then write one token of each sample."""
        try:
            self._read(batch, events)
            steps = self._step(name, batch)
        except Exception as error:  # noqa: BLE001 - the server continues
            failed = [one for one in self._running.values() if one.model == name]
            events += [(writing, _logged(error)) for writing in failed]
            for writing in failed:
                del self._running[writing.sample]
            batch.clear()
            return
        for step in steps:
            events.append((self._running[step.sample], step))
            if step.is_last:
                del self._running[step.sample]
        self._metrics.wrote(name, sum(not step.is_end for step in steps))

    def _read(self, batch: ContinuousBatch, events: _Events) -> None:
        try:
            batch.read(_SLICE_S)
        except ReadingError as error:
            events.append((self._running.pop(error.sample), _logged(error)))

    def _step(self, name: str, batch: ContinuousBatch) -> list[Step]:
        if not batch.num_rows:
            return []
        with self._metrics.stepping(name):
            return batch.step()

    def _work(self) -> None:
        """A time slice of other work, round-robin over tasks."""
        ends_s = time.monotonic() + _SLICE_S
        while True:
            with self._changed:
                if not self._tasks or self._is_closing:
                    return
                task = self._tasks.popleft()
            if task.has_more_after_a_step():
                with self._changed:
                    self._tasks.append(task)
            if time.monotonic() >= ends_s:
                return

    def _send(self, events: _Events) -> None:
        if not events or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_deliver, events)
        except RuntimeError:  # the event loop has ended
            with self._changed:
                self._is_closing = True


def _deliver(events: _Events) -> None:
    for writing, event in events:
        if isinstance(event, Exception) or event.is_last:
            writing.is_over = True
        writing.put(event)


def _logged(error: Exception) -> Exception:
    _log.error("a sample could not be written", exc_info=error)
    return error
