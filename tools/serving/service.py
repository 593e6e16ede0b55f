"""What requests are answered with: models, the engine, limits and counts."""

import asyncio
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TypeVar

from torch import Tensor

from data_pipeline.growing_text import sendable
from megaback.infill import Infiller
from tools.serving.engine import Engine
from tools.serving.guard import Limits
from tools.serving.metrics import Metrics
from tools.serving.models import ServedModel
from tools.serving.problems import ProblemError

_Result = TypeVar("_Result")


def _one_thread() -> ThreadPoolExecutor:
    """One, so that texts, however many come at once, share the interpreter with the event loop."""
    return ThreadPoolExecutor(1, thread_name_prefix="megaback-text")


@dataclass(frozen=True)
class Service:
    """One server's parts."""

    models: dict[str, ServedModel]
    engine: Engine
    limits: Limits
    metrics: Metrics
    infiller: Infiller | None = None
    _text_thread: ThreadPoolExecutor = field(default_factory=_one_thread)

    async def aside(self, function: Callable[[], _Result]) -> _Result:
        """Compute what takes time in the length of a text off the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._text_thread, function)

    def close(self) -> None:
        """End the threads, and with them what is being written."""
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

    async def log_probabilities(
        self, model: ServedModel, given: Sequence[int], written: Sequence[int]
    ) -> Tensor:
        """log P of all ids at each place of `written`: shape (written, V); see `Sampler`."""
        future = self.engine.call(lambda: model.sampler.log_probabilities(given, written))
        return await asyncio.wrap_future(future)
