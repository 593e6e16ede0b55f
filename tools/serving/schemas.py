"""Request schemas: OpenAI's completions, and megaback's additions.

OpenAI's fields that this server does not support are declared, so that they are refused by name
and never ignored.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    GetJsonSchemaHandler,
    StringConstraints,
    Tag,
    model_validator,
)
from pydantic_core import CoreSchema

from data_pipeline.common.number_ranges import (
    COUNT,
    COUNT_OR_ZERO,
    LOGIT_BIAS,
    REPETITION_PENALTY,
    SEED,
    SHARE,
    SOME_SHARE,
    TEMPERATURE,
    TOKEN_ID,
    TOP_K,
    TOP_K_OR_ALL,
)

MAX_SAMPLES = 64
MAX_STOPS = 4
MAX_STOP_IDS = 1024
MAX_LIKELIEST = 20
_ABOUT = ("title", "description", "default")
_MAX_IDS = 1 << 20  # ids of a prompt; the limit of the context is checked later

Seed = Annotated[int, SEED]
StopText = Annotated[str, StringConstraints(min_length=1, max_length=200)]


def _is_bool(value: Any) -> Any:
    if not isinstance(value, bool):
        raise ValueError("it must be true or false")
    return value


def _is_no_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("it must be a number")
    return value


# Python finds 0, 0.0 and False equal, and so does Literal; JSON does not.
_False = Annotated[Literal[False], BeforeValidator(_is_bool)]
_Zero = Annotated[Literal[0], BeforeValidator(_is_no_bool)]
_One = Annotated[Literal[1], BeforeValidator(_is_no_bool)]


class Body(BaseModel):
    """Base of request schemas: null means the default, where OpenAI's description allows null.

    An unknown field is an error, so that no misspelled one is ignored.
    """

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, strict=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        fields = cls.model_fields
        return {
            name: value
            for name, value in values.items()
            if value is not None or name not in fields or fields[name].is_required()
        }

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        """Allow null in the OpenAPI description where the server does."""
        schema = handler.resolve_ref_schema(handler(core_schema))
        for name, field in schema.get("properties", {}).items():
            alternatives = field.get("anyOf", [])
            if name in schema.get("required", []) or {"type": "null"} in alternatives:
                continue
            about = {key: field.pop(key) for key in _ABOUT if key in field}
            kinds = alternatives if set(field) == {"anyOf"} else [field.copy()]
            field.clear()
            field.update({"anyOf": [*kinds, {"type": "null"}], **about})
        return schema


class Request(Body):
    """Request to a model."""

    model: str | None = Field(None, description="Name from /v1/models; default: the first one.")


class Sampling(Request):
    """Sampling options; those that OpenAI lacks are named as in vLLM."""

    max_tokens: Annotated[int, COUNT_OR_ZERO] = 16
    temperature: Annotated[float, TEMPERATURE] = Field(
        1.0, description="0 takes the most likely token."
    )
    top_p: Annotated[float, SOME_SHARE] = 1.0
    top_k: Annotated[int, TOP_K_OR_ALL] = Field(0, description="0 or -1 for all.")
    min_p: Annotated[float, SHARE] = 0.0
    repetition_penalty: Annotated[float, REPETITION_PENALTY] = 1.0
    seed: Seed | None = Field(None, description="Seed of the first sample; sample i uses seed + i.")
    min_tokens: Annotated[int, COUNT_OR_ZERO] = Field(
        0, description="Minimum tokens before a sample may end by itself."
    )
    ignore_eos: bool = Field(False, description="Samples end only at max_tokens or a stop text.")


class StreamOptions(Body):
    include_usage: bool = Field(default=False, description="A last event contains the usage.")
    continuous_usage_stats: bool = Field(
        default=False, description="Every event contains the usage so far."
    )
    include_obfuscation: _False = False


def _kind_of_prompt(value: Any) -> str:
    """Discriminator of the alternatives, so that errors are those of the intended one only."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, int) and not isinstance(first, bool):
        return "ids"
    if isinstance(first, list):
        return "several_ids"
    return "texts" if isinstance(value, list) else "text"


_Id = Annotated[int, TOKEN_ID]
_Ids = Annotated[list[_Id], Field(min_length=1, max_length=_MAX_IDS, fail_fast=True)]
_Several = Field(min_length=1, max_length=MAX_SAMPLES, fail_fast=True)
_Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], _Several, Tag("texts")]
    | Annotated[_Ids, Tag("ids")]
    | Annotated[list[_Ids], _Several, Tag("several_ids")],
    Discriminator(_kind_of_prompt),
]


class Written(Sampling):
    """Options of the output: length, number, streaming."""

    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_order: Literal["reading", "writing"] = Field(
        "reading",
        description="reading: the parts of a choice, concatenated, are its text. "
        "writing: parts are sent as they are written; each part of a backward model precedes all "
        "earlier ones.",
    )
    user: str | None = None
    presence_penalty: _Zero | None = None
    frequency_penalty: _Zero | None = None
    logit_bias: Annotated[dict[str, Annotated[float, LOGIT_BIAS]], Field(max_length=0)] | None = (
        None
    )

    @property
    def stops(self) -> list[str]:
        if self.stop is None:
            return []
        return [self.stop] if isinstance(self.stop, str) else self.stop


class CompletionRequest(Written):
    prompt: _Prompt | None = Field(
        description="Text after which (backward model: before which) the model writes: one or "
        "several texts, or ids in the model's order, as the exported tokenizer returns them. null "
        "is the edge of a text."
    )
    truncate: bool = Field(
        False,
        description="Truncate a prompt that is longer than the context to the part next to the "
        "new text, instead of refusing it.",
    )
    echo: bool = Field(False, description="Return the prompt too, in its place in the text.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None
    stop_token_ids: Annotated[list[_Id], Field(max_length=MAX_STOP_IDS, fail_fast=True)] = Field(
        [], description="Ids that end a sample, besides the end marker; not part of it."
    )
    first_token_ids: _Ids | None = Field(
        None,
        description="Of a prompt of ids: those that the first new id is one of. Its text is whole, "
        "also if it repeats a piece that the client has held back.",
    )
    return_token_ids: bool = Field(
        False, description="Return `token_ids` and `prompt_token_ids`, in the model's order."
    )
    best_of: _One | None = None
    suffix: Literal[""] | None = None

    @property
    def prompts(self) -> "list[str | list[int]]":
        if self.prompt is None:
            return [""]
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]
        return list(self.prompt)


class TextPart(Body):
    type: Literal["text"]
    text: str


class Message(Body):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, max_length=MAX_SAMPLES)]
    name: str | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, str):
            return self.content
        return "".join(part.text for part in self.content)


class TextFormat(Body):
    type: Literal["text"]


class ChatRequest(Written):
    """One message that a BackChat model answers; /v1/backchat also ranks its answers."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: Annotated[int, COUNT] = Field(
        512, description="Maximum new tokens; fewer if the context is full."
    )
    max_completion_tokens: Annotated[int, COUNT] | None = None
    logprobs: _False = False
    response_format: TextFormat | None = None
    store: _False = False


class BackChatRequest(Sampling):
    """A response for which a backward model writes instructions, or the reverse."""

    max_tokens: Annotated[int, COUNT] = 128
    response: str | None = Field(None, min_length=1, description="Response, for a backward model.")
    instruction: str | None = Field(
        None, min_length=1, description="Instruction, for a forward model."
    )
    n: int = Field(
        4, ge=1, le=MAX_SAMPLES, description="Number of samples; distinct ones are returned."
    )


class ScoreRequest(Request):
    """Whole texts, instructions for a response, or responses to an instruction."""

    texts: Annotated[list[str], Field(min_length=1, max_length=MAX_SAMPLES)] = Field(
        description="Whole documents, or a BackChat model's texts for the given one."
    )
    response: str | None = Field(None, min_length=1, description="`texts` are instructions for it.")
    instruction: str | None = Field(None, min_length=1, description="`texts` are responses to it.")


class InfillRequest(Body):
    """Beginning and ending of a text."""

    beginning: str = Field(min_length=1)
    ending: str = Field(min_length=1)
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    max_tokens: int = Field(32, ge=1, le=256, description="Of the middle.")
    candidates: int = Field(16, ge=1, le=MAX_SAMPLES, description="Samples of each model.")
    temperature: Annotated[float, TEMPERATURE] = 0.8
    top_k: Annotated[int, TOP_K] = Field(200, description="0 for all.")
    seed: Seed | None = None
