"""What requests are answered with: models, the engine, limits and counts."""

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from data_pipeline.growing_text import sendable
from megaback.infill import Infiller
from tools.serving.engine import Engine
from tools.serving.guard import Limits
from tools.serving.metrics import Metrics
from tools.serving.models import ServedModel
from tools.serving.problems import ProblemError


@dataclass(frozen=True)
class Service:
    """One server's parts."""

    models: dict[str, ServedModel]
    engine: Engine
    limits: Limits
    metrics: Metrics
    infiller: Infiller | None = None

    def model(self, name: str | None) -> ServedModel:
        """A model by name, or the first one. Raises ProblemError when there is none."""
        if name is None:
            return next(iter(self.models.values()))
        if name not in self.models:
            there = ", ".join(self.models)
            shown = sendable(name)[:100]
            raise ProblemError(404, f"there is no model {shown!r}; use {there}", "model_not_found")
        return self.models[name]

    async def log_probabilities(
        self, model: ServedModel, given: Sequence[int], written: Sequence[int]
    ) -> Tensor:
        """log P of all ids at each place of `written`: shape (written, V); see `Sampler`."""
        future = self.engine.call(lambda: model.sampler.log_probabilities(given, written))
        return await asyncio.wrap_future(future)
