"""Shared state of the request handlers: models, the engine, limits and metrics."""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar
from weakref import WeakSet

from data_pipeline.text.incremental import sendable
from megaback.inference.infill.infiller import Infiller
from megaback.inference.steps import Steps
from tools.serving.deadline import Deadline
from tools.serving.errors import ProblemError
from tools.serving.models import ServedModel
from tools.serving.prometheus import Metrics
from tools.serving.request_limits import MAX_MEETINGS_AT_ONCE, Limits
from tools.serving.worker import Engine

_Result = TypeVar("_Result")


def _one_thread() -> ThreadPoolExecutor:
    """One thread, so that any number of texts leaves the interpreter to the event loop."""
    return ThreadPoolExecutor(1, thread_name_prefix="megaback-text")


def _meetings() -> asyncio.Semaphore:
    return asyncio.Semaphore(MAX_MEETINGS_AT_ONCE)


@dataclass(kw_only=True)
class Service:
    """Parts of a server."""

    models: dict[str, ServedModel]
    engine: Engine
    limits: Limits
    metrics: Metrics
    infiller: Infiller | None = None
    meetings: asyncio.Semaphore = field(default_factory=_meetings)
    """Limit of concurrent work of the infiller's models: each has large tables in memory."""
    _text_thread: ThreadPoolExecutor = field(default_factory=_one_thread)
    _deadlines: "WeakSet[Deadline]" = field(default_factory=WeakSet)
    _is_ending: bool = False

    async def aside(self, function: Callable[[], _Result]) -> _Result:
        """Run a function whose time depends on a text's length off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, function)

    async def compute(self, steps: "Steps[_Result]") -> _Result:
        """Run a function in the engine's thread, between steps of samples."""
        return await asyncio.wrap_future(self.engine.compute(steps))

    def deadline(self, max_s: float | None = None) -> Deadline:
        """Deadline of a request that starts now, or of a part of its work."""
        deadline = Deadline(self.limits.request_s if max_s is None else max_s)
        self._deadlines.add(deadline)
        if self._is_ending:
            deadline.end()
        return deadline

    def end(self) -> None:
        """Answer all requests with the text written so far. Must be called on the event loop."""
        self._is_ending = True
        for deadline in list(self._deadlines):
            deadline.end()

    def close(self) -> None:
        """Stop the threads and all running samples."""
        self._text_thread.shutdown(wait=True, cancel_futures=True)
        self.engine.close()

    def model(self, name: str | None) -> ServedModel:
        """A model by name, or the first one. Raises ProblemError when there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            there = ", ".join(self.models)
            shown = sendable(name)[:100]
            raise ProblemError(
                404, f"there is no model {shown!r}; use {there}", "model_not_found", param="model"
            )
        return self.models[name]
