"""The thread that computes: it writes the samples of all requests together.

Everything that computes runs in this one thread; requests are handled on the event loop. Samples
begin in the order in which they came, as soon as there is a place.
"""

import asyncio
import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, TypeVar

from megaback.batch import Batch, Sample, Step
from tools.serving.metrics import Metrics

_log = logging.getLogger("megaback.serve")
_Result = TypeVar("_Result")
# So that those that are being written do not wait long for prompts to be read.
_MOST_BEGUN_AT_ONCE = 4


class EngineFullError(Exception):
    """More samples wait than may."""


@dataclass(eq=False)
class Writing:
    """A sample of a request, and where to put what is written: a Step, or what went wrong."""

    model: str
    sample: Sample
    put: Callable[["Step | Exception"], None]
    """Called on the event loop."""
    is_over: bool = field(default=False, init=False)


class Engine:
    """Runs the batches of some models in a thread of its own."""

    def __init__(self, batches: Mapping[str, Batch], most_waiting: int, metrics: Metrics) -> None:
        self._batches, self._most_waiting, self._metrics = dict(batches), most_waiting, metrics
        self._changed = threading.Condition()
        self._waiting: dict[str, deque[Writing]] = {name: deque() for name in batches}
        self._running: dict[Sample, Writing] = {}
        self._given_up: list[Writing] = []
        self._calls: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._is_closing = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="megaback-engine", daemon=True)

    def start(self) -> None:
        """Call it on the event loop that is to be told."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self) -> None:
        """End the thread, and with it what it writes."""
        with self._changed:
            self._is_closing = True
            self._changed.notify()
        self._thread.join()

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def write(self, writings: list[Writing]) -> None:
        """Write these when there is room. Raises EngineFullError, and then takes none of them."""
        with self._changed:
            num_waiting = sum(map(len, self._waiting.values()))
            if num_waiting and num_waiting + len(writings) > self._most_waiting:
                raise EngineFullError(f"{num_waiting} samples are waiting already")
            for writing in writings:
                self._waiting[writing.model].append(writing)
            self._changed.notify()

    def give_up(self, writings: list[Writing]) -> None:
        """Write these no further; those that are over do not mind."""
        with self._changed:
            self._given_up += [writing for writing in writings if not writing.is_over]
            self._changed.notify()

    def call(self, function: Callable[[], _Result]) -> "Future[_Result]":
        """Compute something else between two steps."""
        future: Future[_Result] = Future()
        with self._changed:
            self._calls.append((function, future))
            self._changed.notify()
        return future

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(self._has_work)
                if self._is_closing:
                    return
                given_up, self._given_up = self._given_up, []
                call = self._calls.popleft() if self._calls else None
                begun = self._next_to_begin(given_up)
                num_waiting = {name: len(waiting) for name, waiting in self._waiting.items()}
            for writing in given_up:
                self._running.pop(writing.sample, None)
                self._batches[writing.model].remove(writing.sample)
            if call is not None:
                _compute(*call)
            told: list[tuple[Writing, Step | Exception]] = []
            for writing in begun:
                self._begin(writing, told)
            for name, batch in self._batches.items():
                self._step(name, batch, told)
                self._metrics.rows(name, running=len(batch), waiting=num_waiting[name])
            self._tell(told)

    def _has_work(self) -> bool:
        return bool(
            self._is_closing
            or self._given_up
            or self._calls
            or self._running
            or any(self._waiting.values())
        )

    def _next_to_begin(self, given_up: list[Writing]) -> list[Writing]:
        """Those for which there is room; what was given up while it waited is gone."""
        begun: list[Writing] = []
        leaving = set(given_up)
        for name, waiting in self._waiting.items():
            if leaving:
                kept = [writing for writing in waiting if writing not in leaving]
                waiting.clear()
                waiting.extend(kept)
            free = self._batches[name].num_slots - len(self._batches[name])
            begun += [
                waiting.popleft() for _ in range(min(free, _MOST_BEGUN_AT_ONCE, len(waiting)))
            ]
        return begun

    def _begin(self, writing: Writing, told: "list[tuple[Writing, Step | Exception]]") -> None:
        try:
            self._batches[writing.model].add(writing.sample)
        except Exception as error:  # noqa: BLE001 - told to the one whose sample it is
            told.append((writing, _logged(error)))
            return
        self._running[writing.sample] = writing
        self._metrics.began(writing.model, len(writing.sample.prompt.ids))

    def _step(
        self, name: str, batch: Batch, told: "list[tuple[Writing, Step | Exception]]"
    ) -> None:
        if not len(batch):
            return
        try:
            with self._metrics.stepping(name):
                steps = batch.step()
        except Exception as error:  # noqa: BLE001 - the server lives on
            failed = [one for one in self._running.values() if one.model == name]
            told += [(writing, _logged(error)) for writing in failed]
            for writing in failed:
                del self._running[writing.sample]
            batch.clear()
            return
        for step in steps:
            told.append((self._running[step.sample], step))
            if step.is_last:
                del self._running[step.sample]
        self._metrics.wrote(name, sum(not step.is_end for step in steps))

    def _tell(self, told: "list[tuple[Writing, Step | Exception]]") -> None:
        if not told or self._loop is None:
            return
        try:
            self._loop.call_soon_threadsafe(_put, told)
        except RuntimeError:  # the loop has ended, and nobody listens
            with self._changed:
                self._is_closing = True


def _put(told: "list[tuple[Writing, Step | Exception]]") -> None:
    for writing, event in told:
        if isinstance(event, Exception) or event.is_last:
            writing.is_over = True
        writing.put(event)


def _compute(function: Callable[[], Any], future: "Future[Any]") -> None:
    if not future.set_running_or_notify_cancel():
        return
    try:
        future.set_result(function())
    except Exception as error:  # noqa: BLE001 - raised where it is waited for
        future.set_exception(error)


def _logged(error: Exception) -> Exception:
    _log.error("a sample could not be written", exc_info=error)
    return error
