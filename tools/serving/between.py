"""/v1/infill: the middle of a text, by a backward and a forward model that meet."""

import asyncio
from dataclasses import asdict

from data_pipeline.growing_text import sendable
from megaback.choice import SamplingOptions
from megaback.infill import InfillOptions
from tools.serving import wire
from tools.serving.completions import chosen_seed
from tools.serving.problems import ProblemError
from tools.serving.service import Service


async def fill(service: Service, request: wire.InfillRequest) -> wire.Infills:
    """Different middles, the best first. All is computed at once, between two steps of samples."""
    infiller = service.infiller
    if infiller is None:
        raise ProblemError(
            400, "infilling needs a backward and a --forward model of one tokenizer, unit token"
        )
    for model in service.models.values():
        model.require_bytes(request.beginning + request.ending)
    seed = chosen_seed(request.seed)
    options = InfillOptions(
        most_tokens=request.max_tokens,
        forward_candidates=request.candidates,
        backward_candidates=request.candidates,
        rescored=max(request.candidates, request.n),
        sampling=SamplingOptions(temperature=request.temperature, top_k=request.top_k, seed=seed),
    )
    future = service.engine.call(lambda: infiller.fill(request.beginning, request.ending, options))
    found = (await asyncio.wrap_future(future))[: request.n]
    infills = [wire.Infill(**{**asdict(one), "middle": sendable(one.middle)}) for one in found]
    return wire.Infills(infills=infills, seed=seed)
