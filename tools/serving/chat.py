"""/v1/chat/completions for BackChat models: one message, one answer.

A model that was fine-tuned answers one message: one that writes backward takes it for the response
and writes the instruction, one that writes forward takes it for the instruction.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from pydantic import BaseModel

from data_pipeline.errors import PromptError
from megaback.inference.batch import Sample
from tools.serving import response_schemas, schemas
from tools.serving.choice_stream import ChoiceText, Part
from tools.serving.completions import Asked, chosen_seed, sampling_options
from tools.serving.context import Service
from tools.serving.errors import ProblemError
from tools.serving.models import Given, ServedModel
from tools.serving.request_limits import require_answer_size


@dataclass
class AskedChat(Asked):
    """A chat completion, or its events."""

    is_streamed: bool = False
    _begun: set[int] = field(default_factory=set)

    def body(
        self, parts: Sequence[tuple[int, Part]], usage: response_schemas.Usage | None
    ) -> BaseModel:
        about: dict[str, Any] = {
            "id": f"chatcmpl-{self.id}",
            "created": self.created_s,
            "model": self.model.name,
            "seed": self.seed,
        }
        if not self.is_streamed:
            choices = [
                response_schemas.ChatChoice(
                    index=index,
                    message=response_schemas.ChatAnswer(content=part.text),
                    finish_reason=part.finish_reason,
                )
                for index, part in parts
            ]
            return response_schemas.ChatCompletion(**about, choices=choices, usage=usage)
        chunks = [
            response_schemas.ChatChunkChoice(
                index=index,
                delta=response_schemas.ChatDelta(role=self._role_of(index), content=part.text),
                finish_reason=part.finish_reason,
            )
            for index, part in parts
        ]
        return response_schemas.ChatChunk(**about, choices=chunks, usage=usage)

    def _role_of(self, index: int) -> str | None:
        """The role, sent once: clients concatenate values of a repeated field."""
        if index in self._begun:
            return None
        self._begun.add(index)
        return "assistant"


async def ask(service: Service, request: schemas.ChatRequest) -> AskedChat:
    """Raises ProblemError for requests that BackChat cannot answer."""
    model = service.model(request.model)
    text = _message(model, request)
    try:
        prompt = await service.aside(lambda: model.chat_prompt(text))
    except PromptError as error:
        raise ProblemError(400, str(error), "invalid_value", param="messages") from None
    seed = chosen_seed(request.seed)
    wanted = request.max_completion_tokens or request.max_tokens
    room = model.decoder.context_tokens - len(prompt.ids)
    fitting = request.model_copy(update={"max_tokens": min(wanted, room)})
    options = sampling_options(fitting, seed, service.limits.tokens)
    require_answer_size(request.n, fitting.max_tokens, None, "n x max_tokens")
    samples = [Sample(prompt, replace(options, seed=seed + at)) for at in range(request.n)]
    choices = [
        ChoiceText(codec=model.codec, given="", prompt=prompt, stops=request.stops) for _ in samples
    ]
    given = [Given(text, prompt, len(prompt.ids))]
    return AskedChat(
        request=request,
        model=model,
        seed=seed,
        given=given,
        choices=choices,
        samples=samples,
        is_streamed=request.stream,
    )


def _message(model: ServedModel, request: schemas.ChatRequest) -> str:
    """The one message that a BackChat model reads."""
    given, written = ("response", "instruction")
    roles: tuple[str, ...] = ("user", "assistant")
    if not model.writes_backward:
        (given, written), roles = (written, given), ("user",)
    messages = request.messages
    if len(messages) != 1 or messages[0].role not in roles:
        raise ProblemError(
            400,
            f"a BackChat model reads one message, the {given} for which it writes the {written}, "
            f"without a system message or earlier turns; send one message of role "
            f"{' or '.join(roles)}, or use /v1/backchat, which also ranks several samples",
            param="messages",
        )
    text = messages[0].text.strip()
    if not text:
        raise ProblemError(400, "the message is empty; give a text", param="messages")
    return text
