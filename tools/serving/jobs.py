"""The samples of one request while they are written, and what ends them before their time."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial

from starlette.requests import Request

from megaback.batch import Sample, Step
from tools.serving.engine import Engine, EngineFullError, Writing
from tools.serving.metrics import Metrics
from tools.serving.problems import ProblemError, busy


class Job:
    """Samples of one model that are one request's. Leaving it ends those that still run."""

    def __init__(
        self, engine: Engine, metrics: Metrics, model: str, samples: Sequence[Sample], most_s: float
    ) -> None:
        self._engine, self._metrics, self._model = engine, metrics, model
        self._events: deque[tuple[int, Step | Exception]] = deque()
        self._woken = asyncio.Event()
        self._started_s = time.monotonic()
        self._ends_s = self._started_s + most_s
        self._has_token = False
        self._writings = [
            Writing(model, sample, partial(self._put, index))
            for index, sample in enumerate(samples)
        ]

    def __enter__(self) -> "Job":
        """Raises ProblemError when too many samples wait."""
        try:
            self._engine.write(self._writings)
        except EngineFullError as error:
            raise busy(f"{error}; try again") from None
        return self

    def __exit__(self, *_raised: object) -> None:
        self._engine.give_up(self._writings)

    def _put(self, index: int, event: "Step | Exception") -> None:
        self._events.append((index, event))
        self._woken.set()

    def end(self, index: int) -> None:
        """Write one sample no further."""
        self._engine.give_up([self._writings[index]])

    async def next(self, patience_s: float) -> "tuple[int, Step] | None":
        """The next step of any sample; None when none came in so many seconds.

        Raises ProblemError when a sample could not be written, or when time is up.
        """
        # Not asyncio.wait_for: until Python 3.12 it may lose a cancellation.
        if not self._events:
            self._woken.clear()
            seconds = max(0.0, min(patience_s, self._ends_s - time.monotonic()))
            alarm = asyncio.get_running_loop().call_later(seconds, self._woken.set)
            try:
                await self._woken.wait()
            finally:
                alarm.cancel()
        if not self._events:
            return None
        index, event = self._events.popleft()
        if isinstance(event, Exception):
            raise ProblemError(500, "the server could not write this; its log says why")
        if not self._has_token:
            self._has_token = True
            self._metrics.first_token(self._model, time.monotonic() - self._started_s)
        return index, event

    @property
    def is_late(self) -> bool:
        return time.monotonic() >= self._ends_s

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """All steps until every sample is over or time is up; then what still runs is cut."""
        running = set(range(len(self._writings)))
        while running and not self.is_late:
            if (found := await self.next(self._ends_s - time.monotonic())) is None:
                continue
            index, step = found
            if step.is_last:
                running.discard(index)
            yield index, step


async def hanging_up(request: Request) -> None:
    """Return when the client of a request, whose body was read, is gone."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
