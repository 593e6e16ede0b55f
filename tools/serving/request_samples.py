"""Samples of one request while they are written, and their cancellation."""

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from functools import partial

from megaback.inference.batch import Sample, Step
from tools.serving.deadline import Deadline
from tools.serving.errors import busy, defect
from tools.serving.prometheus import Metrics
from tools.serving.worker import Engine, EngineFullError, Writing


class Job:
    """Samples of one request with one model; leaving the context cancels running ones."""

    def __init__(
        self,
        engine: Engine,
        metrics: Metrics,
        model: str,
        samples: Sequence[Sample],
        deadline: Deadline,
    ) -> None:
        self._engine, self._metrics, self._model = engine, metrics, model
        self._deadline = deadline
        self._events: deque[tuple[int, Step | Exception]] = deque()
        self._woken = asyncio.Event()
        self._started_s = time.monotonic()
        self._has_token = False
        self._writings = [
            Writing(model, sample, partial(self._put, index))
            for index, sample in enumerate(samples)
        ]
        deadline.when_past(self._woken.set)

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
        if not self._has_token and not isinstance(event, Exception):
            self._has_token = True
            self._metrics.first_token(self._model, time.monotonic() - self._started_s)
        self._events.append((index, event))
        self._woken.set()

    def end(self, index: int) -> None:
        """Cancel one sample."""
        self._engine.give_up([self._writings[index]])

    async def next(self, timeout_s: float | None = None) -> "tuple[int, Step] | None":
        """The next step of any sample; None if none comes within the given seconds or the deadline.

        Raises ProblemError when a sample failed, or when the deadline passed without output.
        """
        # Many events may be here at once. Between two of them the loop notices that a client has
        # disconnected: asyncio warns of each write after that.
        await asyncio.sleep(0)
        # Not asyncio.wait_for: until Python 3.12 it may lose a cancellation.
        if not self._events and not self._deadline.is_past:
            self._woken.clear()
            loop = asyncio.get_running_loop()
            alarm = None if timeout_s is None else loop.call_later(timeout_s, self._woken.set)
            try:
                await self._woken.wait()
            finally:
                if alarm is not None:
                    alarm.cancel()
        if not self._events:
            if self._deadline.is_past and not self._has_token:
                raise self._deadline.problem()
            return None
        index, event = self._events.popleft()
        if isinstance(event, Exception):
            raise defect(event, "sampling failed")
        return index, event

    @property
    def is_late(self) -> bool:
        """Whether the deadline has passed and all steps until then have been taken."""
        return self._deadline.is_past and self._has_token and not self._events

    async def steps(self) -> AsyncIterator[tuple[int, Step]]:
        """All steps until every sample is complete or the deadline ends the others."""
        running = set(range(len(self._writings)))
        while running and not self.is_late:
            if (found := await self.next()) is None:
                continue
            index, step = found
            if step.is_last:
                running.discard(index)
            yield index, step
