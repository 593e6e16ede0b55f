"""/v1/completions: at once, or as a stream of parts."""

import secrets
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass

import torch

from data_pipeline.growing_text import sendable
from data_pipeline.text import Prompt
from megaback.batch import Sample
from megaback.choice import SamplingOptions
from tools.serving import wire
from tools.serving.choices import ChoiceText, Part, Token, log_probs, offsets
from tools.serving.jobs import Job
from tools.serving.models import ServedModel
from tools.serving.problems import ProblemError
from tools.serving.service import Service

_SECONDS_BETWEEN_SIGNS_OF_LIFE = 5.0
_SIGN_OF_LIFE = ": still writing\n\n"
_DONE = "data: [DONE]\n\n"


def sampling_options(request: wire.Sampling, seed: int, most_tokens: int) -> SamplingOptions:
    """Raises ProblemError when more tokens are asked for than may be written."""
    if request.max_tokens > most_tokens:
        raise ProblemError(
            400, f"max_tokens is {request.max_tokens}; at most {most_tokens} are written here"
        )
    return SamplingOptions(
        max_new_tokens=max(request.max_tokens, 1),
        temperature=request.temperature,
        top_k=request.top_k,
        seed=seed,
        top_p=request.top_p,
        min_p=request.min_p,
        repetition_penalty=request.repetition_penalty,
    )


def chosen_seed(seed: int | None) -> int:
    """The seed that is asked for, or any."""
    return secrets.randbelow(1 << 31) if seed is None else seed


@dataclass
class _Asked:
    """A request with what was made of it: choice i is of prompt i // n."""

    request: wire.CompletionRequest
    model: ServedModel
    seed: int
    choices: list[ChoiceText]
    samples: list[Sample]
    given_tokens: dict[str, list[Token]]
    """With `echo` and `logprobs`: those of each prompt."""
    head: wire.Completion

    @property
    def usage(self) -> wire.Usage:
        """What was read of the prompts, and written; without markers."""
        begin_id = self.model.codec.begin_id
        prompt_tokens = sum(
            len(prompt.ids) - (prompt.ids[:1] == [begin_id]) + bool(prompt.held_back)
            for prompt in (choice.prompt for choice in self.choices[:: self.request.n])
        )
        written = sum(choice.tokens for choice in self.choices)
        return wire.Usage(
            prompt_tokens=prompt_tokens,
            completion_tokens=written,
            total_tokens=prompt_tokens + written,
        )

    def body(self, choices: list[wire.Choice], usage: wire.Usage | None) -> wire.Completion:
        return self.head.model_copy(update={"choices": choices, "usage": usage})

    def choice(self, index: int, part: Part) -> wire.Choice:
        wants = self.request.logprobs is not None
        return wire.Choice(
            index=index,
            text=part.text,
            logprobs=log_probs(self.model.codec, part.tokens) if wants else None,
            finish_reason=part.finish_reason,
        )

    def echo(self, index: int) -> Part | None:
        """What comes before all that is written of a choice."""
        if not self.request.echo:
            return None
        given = self.choices[index].given
        return Part(sendable(given), self.given_tokens.get(given, []))

    def whole(self, index: int, parts: list[Part]) -> Part:
        """One part of all parts of a choice, in the order in which they were written."""
        first = self.echo(index)
        parts = [*([] if first is None else [first]), *parts]
        text = self.choices[index].join([part.text for part in parts])
        tokens = [token for part in parts for token in part.tokens]
        return Part(text, tokens, self.choices[index].finish_reason)


async def ask(service: Service, request: wire.CompletionRequest) -> _Asked:
    """Raises ProblemError and PromptError for what cannot be written."""
    model = service.model(request.model)
    seed = chosen_seed(request.seed)
    if len(request.prompts) * request.n > wire.MOST_SAMPLES:
        raise ProblemError(400, f"prompts times n is more than {wire.MOST_SAMPLES}")
    likeliest = request.logprobs
    if likeliest is not None:
        likeliest = min(likeliest, model.codec.vocab_size)
    prompts = await service.aside(lambda: _prompts(model, request))
    choices: list[ChoiceText] = []
    samples: list[Sample] = []
    for given, prompt in zip(request.prompts, prompts, strict=True):
        for _ in range(request.n):
            options = sampling_options(request, seed + len(samples), service.limits.tokens)
            samples.append(Sample(prompt, options, likeliest))
            choices.append(ChoiceText(model.codec, given, prompt, request.stops))
    given_tokens = {}
    if request.echo and likeliest is not None:
        for given in dict.fromkeys(request.prompts):
            given_tokens[given] = await _tokens_of(service, model, given, likeliest)
    head = wire.Completion(
        id=f"cmpl-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=model.name,
        choices=[],
        seed=seed,
    )
    return _Asked(request, model, seed, choices, samples, given_tokens, head)


def _prompts(model: ServedModel, request: wire.CompletionRequest) -> list[Prompt]:
    """Raises PromptError when one does not fit; of a prompt that is echoed with `logprobs`, all."""
    is_cut = request.truncate and not (request.echo and request.logprobs is not None)
    return [model.prompt(given, is_cut=is_cut) for given in request.prompts]


async def _tokens_of(
    service: Service, model: ServedModel, given: str, num_likeliest: int
) -> list[Token]:
    """A prompt's own tokens, in the model's order."""
    codec = model.codec
    ids = await service.aside(lambda: codec.encode(given).tolist())
    if not ids:
        return []
    table = await service.log_probabilities(model, [codec.begin_id], ids)

    def tokens() -> list[Token]:
        of_ids = table.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        values, likeliest = (found.tolist() for found in table.topk(num_likeliest))
        places = offsets(codec, ids, given)
        return [
            Token(piece_id, of_ids[at], list(zip(likeliest[at], values[at], strict=True)), offset)
            for at, (piece_id, offset) in enumerate(zip(ids, places, strict=True))
        ]

    return await service.aside(tokens)


def _job(service: Service, asked: _Asked) -> Job:
    return Job(
        service.engine, service.metrics, asked.model.name, asked.samples, service.limits.request_s
    )


async def complete(service: Service, asked: _Asked) -> str:
    """All choices as JSON, when all are written or time is up."""
    parts: list[list[Part]] = [[] for _ in asked.choices]
    if asked.request.max_tokens:
        with _job(service, asked) as job:
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
        wholes = [asked.whole(index, of_choice) for index, of_choice in enumerate(parts)]
        choices = [asked.choice(index, whole) for index, whole in enumerate(wholes)]
        return asked.body(choices, asked.usage).model_dump_json()

    return await service.aside(body)


async def stream(service: Service, asked: _Asked) -> AsyncIterator[str]:
    """Server-sent events: parts of choices, and [DONE].

    In the order of reading, what a backward model writes is sent when a choice is complete: until
    then its first word is not known.
    """
    kept: list[list[Part]] = [[] for _ in asked.choices]
    is_kept = asked.request.stream_order == "reading" and asked.model.writes_backward
    with_usage = asked.request.stream_options and asked.request.stream_options.include_usage

    def sent(index: int, part: Part) -> str:
        body = asked.body([asked.choice(index, part)], None)
        return f"data: {body.model_dump_json()}\n\n"

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
    if asked.request.max_tokens:
        with _job(service, asked) as job:
            while not all(choice.finish_reason for choice in asked.choices) and not job.is_late:
                try:
                    found = await job.next(_SECONDS_BETWEEN_SIGNS_OF_LIFE)
                except ProblemError as problem:
                    yield f"data: {bytes(problem.response().body).decode()}\n\n"
                    return
                if found is None:
                    yield _SIGN_OF_LIFE
                    continue
                index, step = found
                choice = asked.choices[index]
                if choice.finish_reason is not None:
                    continue
                part = choice.add(step)
                if found_event := await event(index, part):
                    yield found_event
                if part.finish_reason is not None and not step.is_last:
                    job.end(index)
    for index, choice in enumerate(asked.choices):
        if choice.finish_reason is None:
            yield await event(index, choice.finish("length"))
    if with_usage:
        yield f"data: {asked.body([], asked.usage).model_dump_json()}\n\n"
    yield _DONE
