"""/v1/completions: as one response, or as a stream of parts."""

import secrets
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
from pydantic import BaseModel

from data_pipeline.errors import PromptError
from data_pipeline.text.incremental import sendable
from megaback.inference.batch import Sample
from megaback.inference.sampling import SamplingOptions
from megaback.inference.token_scores import ScoredToken
from tools.serving import response_schemas, schemas
from tools.serving.choice_stream import ChoiceText, Part, Token, log_probs, offsets
from tools.serving.context import Service
from tools.serving.deadline import Deadline
from tools.serving.errors import ProblemError
from tools.serving.models import Given, ServedModel
from tools.serving.request_limits import MAX_ECHOED_CHARACTERS, require_answer_size
from tools.serving.request_samples import Job

_SECONDS_BETWEEN_SIGNS_OF_LIFE = 5.0
_SIGN_OF_LIFE = ": still writing\n\n"
_DONE = "data: [DONE]\n\n"
_LINE_BREAKS = "\x85\u2028\u2029"


def sampling_options(request: schemas.Sampling, seed: int, max_tokens: int) -> SamplingOptions:
    """Raises ProblemError when a request exceeds the limit of new tokens."""
    tokens, minimum = request.max_tokens, request.min_tokens
    if tokens > max_tokens:
        message = f"max_tokens is {tokens}; this server's limit is {max_tokens}"
        raise ProblemError(400, message, param="max_tokens")
    if minimum > tokens:
        message = f"min_tokens is {minimum}, above max_tokens {tokens}"
        raise ProblemError(400, message, param="min_tokens")
    return SamplingOptions(
        max_new_tokens=max(tokens, 1),
        temperature=request.temperature,
        top_k=max(request.top_k, 0),
        seed=seed,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
        min_new_tokens=tokens if request.ignore_eos else minimum,
    )


def chosen_seed(seed: int | None) -> int:
    """The requested seed, or a random one."""
    return secrets.randbelow(1 << 31) if seed is None else seed


@dataclass(kw_only=True)
class Asked:
    """A request with its prompts and choices: choice i belongs to prompt i // n."""

    request: schemas.Written
    model: ServedModel
    seed: int
    given: list[Given]
    choices: list[ChoiceText]
    samples: list[Sample]
    given_tokens: list[list[Token]] = field(default_factory=list)
    """Tokens of each prompt, with `echo` and `logprobs`."""
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created_s: int = field(default_factory=lambda: int(time.time()))

    @property
    def usage(self) -> response_schemas.Usage:
        """Tokens of the prompts and of the choices, without markers."""
        prompt_tokens = sum(given.num_tokens for given in self.given)
        written = sum(choice.tokens for choice in self.choices)
        return response_schemas.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=written,
            total_tokens=prompt_tokens + written,
        )

    def body(
        self, parts: Sequence[tuple[int, Part]], usage: response_schemas.Usage | None
    ) -> BaseModel:
        """A response, or an event of a stream, with parts of choices by index."""
        return response_schemas.Completion(
            id=f"cmpl-{self.id}",
            created=self.created_s,
            model=self.model.name,
            choices=[self._choice(index, part) for index, part in parts],
            usage=usage,
            seed=self.seed,
        )

    def event(self, parts: Sequence[tuple[int, Part]], usage: response_schemas.Usage | None) -> str:
        """Server-sent event of an object."""
        return event_of(self.body(parts, usage).model_dump_json())

    def _choice(self, index: int, part: Part) -> response_schemas.Choice:
        request = self.request
        choice = response_schemas.Choice(
            index=index,
            text=part.text,
            finish_reason=part.finish_reason,
            token_ids=None,
            prompt_token_ids=None,
        )
        if isinstance(request, schemas.CompletionRequest):
            if request.logprobs is not None:
                choice.logprobs = log_probs(self.model.codec, part.tokens)
            if request.return_token_ids:
                choice.token_ids = list(part.ids)
            if request.return_token_ids and part.finish_reason is not None:
                choice.prompt_token_ids = self.choices[index].prompt.ids
        return choice

    def echo(self, index: int) -> Part | None:
        """The first part of a choice, before any new text: the echo."""
        if not (isinstance(self.request, schemas.CompletionRequest) and self.request.echo):
            return None
        number = index // self.request.n
        tokens = self.given_tokens[number] if self.given_tokens else []
        return Part(sendable(self.given[number].text), tokens)

    def whole(self, index: int, parts: list[Part]) -> Part:
        """All parts of a choice, in writing order, as one."""
        first = self.echo(index)
        parts = [*([] if first is None else [first]), *parts]
        text = self.choices[index].join([part.text for part in parts])
        tokens = [token for part in parts for token in part.tokens]
        ids = [new_id for part in parts for new_id in part.ids]
        return Part(text, tokens, self.choices[index].finish_reason, ids)


def event_of(body: str) -> str:
    """A server-sent event of JSON in one line, for clients that split lines as Python does."""
    for character in _LINE_BREAKS:
        body = body.replace(character, f"\\u{ord(character):04x}")
    return f"data: {body}\n\n"


async def ask(service: Service, request: schemas.CompletionRequest, deadline: Deadline) -> Asked:
    """Raises ProblemError for a request that cannot be answered."""
    model = service.model(request.model)
    seed = chosen_seed(request.seed)
    prompts, n = request.prompts, request.n
    if len(prompts) * n > schemas.MAX_SAMPLES:
        raise ProblemError(
            400, f"prompts x n exceeds the limit of {schemas.MAX_SAMPLES}", param="n"
        )
    likeliest = request.logprobs
    if likeliest is not None:
        likeliest = min(likeliest, model.codec.vocab_size)
    options = replace(
        sampling_options(request, seed, service.limits.tokens),
        stop_ids=tuple(request.stop_token_ids),
    )
    if max(options.stop_ids, default=0) >= model.codec.vocab_size:
        message = f"{max(options.stop_ids)} does not exist: this model has "
        raise ProblemError(
            400, f"stop_token_ids: {message}{model.codec.vocab_size} ids", param="stop_token_ids"
        )
    require_answer_size(
        len(prompts) * n,
        request.max_tokens,
        likeliest,
        "prompts x n x max_tokens" + ("" if likeliest is None else " x (1 + logprobs)"),
    )
    given = [await _given(service, model, request, prompt) for prompt in prompts]
    choices: list[ChoiceText] = []
    samples: list[Sample] = []
    for one in given:
        for _ in range(n):
            samples.append(
                Sample(one.prompt, replace(options, seed=seed + len(samples)), likeliest)
            )
            choices.append(
                ChoiceText(
                    codec=model.codec, given=one.text, prompt=one.prompt, stops=request.stops
                )
            )
    given_tokens = []
    if request.echo:
        characters = n * sum(len(one.text) for one in given)
        if characters > MAX_ECHOED_CHARACTERS:
            message = (
                f"echo returns each prompt n times, {characters} characters in all; the limit "
            )
            raise ProblemError(400, f"{message}is {MAX_ECHOED_CHARACTERS}", param="echo")
        if likeliest is not None:
            given_tokens = await _tokens_of(service, model, given, likeliest, n, deadline)
    return Asked(
        request=request,
        model=model,
        seed=seed,
        given=given,
        choices=choices,
        samples=samples,
        given_tokens=given_tokens,
    )


async def _given(
    service: Service,
    model: ServedModel,
    request: schemas.CompletionRequest,
    asked: "str | list[int]",
) -> Given:
    """A prompt, read in full if it is echoed with `logprobs`. Raises ProblemError."""
    is_cut = request.truncate and not (request.echo and request.logprobs is not None)
    try:
        given = await service.aside(lambda: model.given(asked, is_cut=is_cut))
    except PromptError as error:
        raise ProblemError(400, str(error), "invalid_value", param="prompt") from None
    if request.first_token_ids is None:
        return given
    first_ids = np.intersect1d(given.prompt.first_ids, request.first_token_ids)
    if given.ids is None or not len(first_ids):
        message = "is for a prompt of ids, and needs one of this model's ids with text, or its end"
        raise ProblemError(400, f"first_token_ids {message}", param="first_token_ids")
    return replace(given, prompt=replace(given.prompt, first_ids=first_ids))


async def _tokens_of(
    service: Service,
    model: ServedModel,
    given: Sequence[Given],
    num_likeliest: int,
    n: int,
    deadline: Deadline,
) -> list[list[Token]]:
    """The prompts' own tokens, in the model's order. Raises ProblemError."""
    codec = model.codec

    def ids_of(one: Given) -> list[int]:
        return one.ids or [codec.begin_id, *codec.encode(one.text).tolist()]

    ids = [await service.aside(partial(ids_of, one)) for one in given]
    product = "echo: tokens of all prompts x n x (1 + logprobs)"
    require_answer_size(n, sum(map(len, ids)), num_likeliest, product)

    def tokens(one: Given, ids: list[int], scored: list[ScoredToken]) -> list[Token]:
        places = offsets(codec, ids, one.text)
        first = [Token(ids[0], None, (), places[0])] if one.ids is not None else []
        rest = zip(ids[1:], scored, places[1:], strict=True)
        return first + [Token(piece_id, *scores, place) for piece_id, scores, place in rest]

    found = []
    for one, of_one in zip(given, ids, strict=True):
        steps = model.decoder.score_steps(of_one[:1], of_one[1:], num_likeliest)
        scored = await deadline.within(service.compute(steps)) if len(of_one) > 1 else []
        found.append(await service.aside(partial(tokens, one, of_one, scored)))
    return found


def job_of(service: Service, asked: Asked, deadline: Deadline) -> Job:
    """Parameters of a response's samples."""
    samples = asked.samples if asked.request.max_tokens else []
    return Job(service.engine, service.metrics, asked.model.name, samples, deadline)


async def complete(service: Service, asked: Asked, deadline: Deadline) -> str:
    """All choices as JSON, when all are complete or the deadline has passed."""
    parts: list[list[Part]] = [[] for _ in asked.choices]
    with job_of(service, asked, deadline) as job:
        async for index, step in job.steps():
            if asked.choices[index].finish_reason is not None:
                continue
            part = asked.choices[index].add(step)
            parts[index].append(part)
            if part.finish_reason is not None and not step.is_last:
                job.end(index)
            if all(choice.finish_reason for choice in asked.choices):
                break
    for index, choice in enumerate(asked.choices):
        if choice.finish_reason is None:
            parts[index].append(choice.finish("length"))

    def body() -> str:
        wholes = [(index, asked.whole(index, of_choice)) for index, of_choice in enumerate(parts)]
        return asked.body(wholes, asked.usage).model_dump_json()

    return await service.aside(body)


async def stream(service: Service, asked: Asked, job: Job) -> AsyncGenerator[str, None]:
    """Server-sent events: parts of choices, which `job` writes, and [DONE].

    In reading order, a backward model's choice is sent when it is complete, as its first word is
    written last.
    """
    kept: list[list[Part]] = [[] for _ in asked.choices]
    is_kept = asked.request.stream_order == "reading" and asked.model.writes_backward
    wanted = asked.request.stream_options or schemas.StreamOptions()

    def sent(index: int, part: Part) -> str:
        return asked.event([(index, part)], asked.usage if wanted.continuous_usage_stats else None)

    async def event(index: int, part: Part) -> str:
        if is_kept:
            kept[index].append(part)
            if part.finish_reason is None:
                return ""
            return await service.aside(lambda: sent(index, asked.whole(index, kept[index])))
        if not part.text and not part.tokens and part.finish_reason is None:
            return ""
        return sent(index, part)

    if not is_kept:
        for index in range(len(asked.choices)):
            if (first := asked.echo(index)) is not None:
                yield await event(index, first)
    is_written = not asked.request.max_tokens
    sent_s = time.monotonic()
    while not (is_written or job.is_late):
        event_now = ""
        try:
            found = await job.next(sent_s + _SECONDS_BETWEEN_SIGNS_OF_LIFE - time.monotonic())
        except ProblemError as problem:
            yield event_of(bytes(problem.response().body).decode())
            return
        if found is not None and asked.choices[found[0]].finish_reason is None:
            index, step = found
            part = asked.choices[index].add(step)
            event_now = await event(index, part)
            if part.finish_reason is not None and not step.is_last:
                job.end(index)
            is_written = all(choice.finish_reason for choice in asked.choices)
        if not event_now and time.monotonic() >= sent_s + _SECONDS_BETWEEN_SIGNS_OF_LIFE:
            event_now = _SIGN_OF_LIFE
        if event_now:
            yield event_now
            sent_s = time.monotonic()
    for index, choice in enumerate(asked.choices):
        if choice.finish_reason is None:
            yield await event(index, choice.finish("length"))
    if wanted.include_usage:
        yield asked.event([], asked.usage)
    yield _DONE
