"""/v1/infill: the middle of a text, by a backward and a forward model that meet."""

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace

from data_pipeline.text.codec import Prompt, TextCodec
from data_pipeline.text.incremental import sendable
from megaback.inference.batch import Sample
from megaback.inference.infill.infiller import Infill, Infiller, InfillOptions, different_halves
from megaback.inference.infill.join_scores import Half
from megaback.inference.infill.prompts import InfillPrompts
from megaback.inference.sampling import SamplingOptions
from tools.serving import response_schemas, schemas
from tools.serving.completions import chosen_seed
from tools.serving.context import Service
from tools.serving.deadline import Deadline
from tools.serving.errors import ProblemError
from tools.serving.request_limits import MAX_INFILL_TOKENS
from tools.serving.request_samples import Job


async def fill(
    service: Service, request: schemas.InfillRequest, deadline: Deadline
) -> response_schemas.Infills:
    """Distinct middles, the best first.

    Samples of both models are batched with those of other requests, for at most half of the
    request's time; they are then joined and scored between the steps of others.
    """
    infiller = service.infiller
    if infiller is None:
        raise ProblemError(
            400, "infilling needs a backward and a --forward model of one tokenizer, unit token"
        )
    if request.candidates * request.max_tokens > MAX_INFILL_TOKENS:
        asked = f"candidates x max_tokens is {request.candidates * request.max_tokens}"
        raise ProblemError(400, f"{asked}; the limit is {MAX_INFILL_TOKENS}", "invalid_value")
    for model in service.models.values():
        model.require_bytes(request.beginning + request.ending)
    seed = chosen_seed(request.seed)
    options = InfillOptions(
        max_new_tokens=request.max_tokens,
        forward_candidates=request.candidates,
        backward_candidates=request.candidates,
        rescored=max(request.candidates, request.n),
        sampling=SamplingOptions(
            request.max_tokens, temperature=request.temperature, top_k=request.top_k, seed=seed
        ),
    )
    beginning, ending = request.beginning, request.ending
    gap = await service.aside(lambda: infiller.read(beginning, ending, request.max_tokens))
    prompts = [
        await service.aside(lambda: infiller.forward.codec.prompt(beginning)),
        await service.aside(lambda: infiller.backward.codec.prompt(ending)),
    ]
    halves = await _written(service, infiller, prompts, options)
    found = await deadline.within(_joined(service, infiller, gap, halves, options))
    infills = [
        response_schemas.Infill(**{**asdict(one), "middle": sendable(one.middle)})
        for one in found[: request.n]
    ]
    return response_schemas.Infills(infills=infills, seed=seed)


async def _written(
    service: Service, infiller: Infiller, prompts: Sequence[Prompt], options: InfillOptions
) -> list[list[Half]]:
    """Samples of each model, the forward one first, in half of the request's time."""
    half_time = service.deadline(service.limits.request_s / 2)
    sampling, count = options.sampling, options.forward_candidates
    try:
        with ExitStack() as stack:
            jobs = []
            for reader, prompt in zip((infiller.forward, infiller.backward), prompts, strict=True):
                name = _name_of(service, reader.codec)
                seeds = range(sampling.seed, sampling.seed + count)
                samples = [Sample(prompt, replace(sampling, seed=seed)) for seed in seeds]
                job = Job(service.engine, service.metrics, name, samples, half_time)
                jobs.append(stack.enter_context(job))
            # Both write while one is read.
            return [different_halves(await _ids(job, count)) for job in jobs]
    finally:
        half_time.close()


async def _ids(job: Job, count: int) -> list[list[int]]:
    ids: list[list[int]] = [[] for _ in range(count)]
    async for index, step in job.steps():
        if not step.is_end:
            ids[index].append(step.new_id)
    return ids


def _name_of(service: Service, codec: TextCodec) -> str:
    """The served model of a direction."""
    return next(
        name
        for name, model in service.models.items()
        if model.codec.format.direction is codec.format.direction
    )


async def _joined(
    service: Service,
    infiller: Infiller,
    gap: InfillPrompts,
    halves: list[list[Half]],
    options: InfillOptions,
) -> list[Infill]:
    async with service.meetings:
        onwards, backwards = halves
        return await service.compute(infiller.meet_steps(gap, onwards, backwards, options))
