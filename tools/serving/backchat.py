"""/v1/backchat and /v1/score: instructions for a response, and log probabilities of texts."""

import math
from dataclasses import replace
from functools import partial

from data_pipeline.errors import PromptError
from data_pipeline.text.incremental import sendable
from megaback.inference.batch import Sample
from megaback.inference.chat import ranked
from tools.serving import response_schemas, schemas
from tools.serving.completions import chosen_seed, sampling_options
from tools.serving.context import Service
from tools.serving.deadline import Deadline
from tools.serving.errors import ProblemError
from tools.serving.models import ServedModel
from tools.serving.request_limits import require_answer_size
from tools.serving.request_samples import Job


def _given(
    model: ServedModel, request: "schemas.BackChatRequest | schemas.ScoreRequest"
) -> str | None:
    """Prompt of the texts. Raises ProblemError for a field that this model does not take."""
    texts = {"response": request.response, "instruction": request.instruction}
    name = "response" if model.writes_backward else "instruction"
    other = next(key for key in texts if key != name)
    if texts[other] is not None:
        direction = model.codec.format.direction.value
        raise ProblemError(400, f"{model.name} writes {direction}: send {name}, not {other}")
    text = texts[name]
    if text is not None and not text.strip():
        raise ProblemError(400, f"{name} is empty; give a text")
    return None if text is None else text.strip()


async def answer(
    service: Service, request: schemas.BackChatRequest, deadline: Deadline
) -> response_schemas.BackChat:
    """Distinct samples for a prompt, complete ones first, then the likeliest first."""
    model = service.model(request.model)
    given = _given(model, request)
    if given is None:
        name = "response" if model.writes_backward else "instruction"
        raise ProblemError(400, f"{name} is missing; give a text")
    seed = chosen_seed(request.seed)
    prompt = await service.aside(lambda: model.chat_prompt(given))
    room = model.decoder.context_tokens - len(prompt.ids)
    request = request.model_copy(update={"max_tokens": min(request.max_tokens, room)})
    options = sampling_options(request, seed, service.limits.tokens)
    require_answer_size(request.n, request.max_tokens, None, "n x max_tokens")
    samples = [Sample(prompt, replace(options, seed=seed + at), 0) for at in range(request.n)]
    ids: list[list[int]] = [[] for _ in samples]
    likelihoods = [0.0] * request.n
    with Job(service.engine, service.metrics, model.name, samples, deadline) as job:
        async for index, step in job.steps():
            ids[index].append(step.new_id)
            likelihoods[index] += step.log_probability or 0.0
    # A sample that did not start in time is dropped.
    each = zip(ids, likelihoods, strict=True)
    found = {tuple(one): likelihood for one, likelihood in each if one}
    written = sum(map(len, ids))
    different = await service.aside(lambda: ranked(model.form, prompt.ids, found))
    return response_schemas.BackChat(
        model=model.name,
        candidates=[
            response_schemas.Candidate(
                text=sendable(one.text),
                log_probability=one.log_probability,
                tokens=one.tokens,
                is_complete=one.is_complete,
            )
            for one in different
        ],
        usage=response_schemas.Usage(
            prompt_tokens=len(prompt.ids),
            completion_tokens=written,
            total_tokens=len(prompt.ids) + written,
        ),
        seed=seed,
    )


async def score(
    service: Service, request: schemas.ScoreRequest, deadline: Deadline
) -> response_schemas.Score:
    """Log probability of each whole text and its end."""
    model = service.model(request.model)
    given = _given(model, request)
    scores: list[response_schemas.TextScore] = []
    for text in request.texts:
        try:
            read, written = await service.aside(partial(_ids, model, given, text))
        except PromptError as error:
            raise ProblemError(400, f"texts.{len(scores)}: {error}", "invalid_value") from None
        steps = model.decoder.score_steps(read, written)
        scored = await deadline.within(service.compute(steps))
        total = sum(log_probability for log_probability, _ in scored)
        num_bytes = len(text.encode("utf-8", "surrogatepass"))
        bits = -total / math.log(2) / num_bytes if num_bytes else None
        scores.append(
            response_schemas.TextScore(
                log_probability=total, tokens=len(written), bytes=num_bytes, bits_per_byte=bits
            )
        )
    return response_schemas.Score(model=model.name, scores=scores)


def _ids(model: ServedModel, given: str | None, text: str) -> tuple[list[int], list[int]]:
    """Prompt ids and target ids: of a whole document, or of a text written for another.

    Raises PromptError when both do not fit the context.
    """
    model.require_bytes(text)
    if given is None:
        whole = model.codec.encode_document(text).tolist()
        read, written = whole[:1], whole[1:]
    else:
        read, written = model.chat_prompt(given).ids, model.form.written_ids(text)
    model.require_room(len(read) + len(written) - 1)
    return read, written
