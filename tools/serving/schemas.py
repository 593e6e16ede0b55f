"""What clients send, as JSON: OpenAI's completions, and what megaback adds.

Fields that OpenAI has and this server cannot honor are known here, so that they are refused by
name and never ignored.
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
MAX_LIKELIEST = 20
_ABOUT = ("title", "description", "default")
_MAX_IDS = 1 << 20  # of a prompt; those that the context does not hold are refused later

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
    """What a client sends: null is the default, as where OpenAI's description allows it.

    A field that does not exist is an error, so that no misspelled one is passed over.
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
        """The description allows null where the server does."""
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
    """A request to a model."""

    model: str | None = Field(None, description="Of /v1/models; the first one by default.")


class Sampling(Request):
    """How ids are chosen; what is not OpenAI's is named as in vLLM."""

    max_tokens: Annotated[int, COUNT_OR_ZERO] = 16
    temperature: Annotated[float, TEMPERATURE] = Field(
        1.0, description="0 takes the most likely token."
    )
    top_p: Annotated[float, SOME_SHARE] = 1.0
    top_k: Annotated[int, TOP_K_OR_ALL] = Field(0, description="0 or -1 for all.")
    min_p: Annotated[float, SHARE] = 0.0
    repetition_penalty: Annotated[float, REPETITION_PENALTY] = 1.0
    seed: Seed | None = Field(
        None, description="Of the first sample; the next ones have the next numbers."
    )
    min_tokens: Annotated[int, COUNT_OR_ZERO] = Field(
        0, description="Before so many, a sample does not end by itself."
    )
    ignore_eos: bool = Field(
        False, description="No sample ends by itself: all are of max_tokens, or end at a stop text."
    )


class StreamOptions(Body):
    include_usage: bool = Field(default=False, description="A last event has the usage.")
    continuous_usage_stats: bool = Field(
        default=False, description="Every event has the usage so far."
    )
    include_obfuscation: _False = False


def _kind_of_prompt(value: Any) -> str:
    """Which alternative is meant, so that a wrong one is told what is wrong, and only that."""
    first = value[0] if isinstance(value, list) and value else None
    if isinstance(first, int) and not isinstance(first, bool):
        return "ids"
    if isinstance(first, list):
        return "several_ids"
    return "texts" if isinstance(value, list) else "text"


_Ids = Annotated[
    list[Annotated[int, TOKEN_ID]], Field(min_length=1, max_length=_MAX_IDS, fail_fast=True)
]
_Several = Field(min_length=1, max_length=MAX_SAMPLES, fail_fast=True)
_Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[list[str], _Several, Tag("texts")]
    | Annotated[_Ids, Tag("ids")]
    | Annotated[list[_Ids], _Several, Tag("several_ids")],
    Discriminator(_kind_of_prompt),
]


class Written(Sampling):
    """What is written of it, and how it is sent."""

    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    stream_order: Literal["reading", "writing"] = Field(
        "reading",
        description="reading: all parts of a choice, joined one after another, are its text. "
        "writing: parts come as they are written; those of a backward model each stand before all "
        "that came earlier.",
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
        description="What comes after the text that a backward model writes, and before that of a "
        "forward model: a text or several, or ids in the model's reading order, as the exported "
        "tokenizer gives them. null is a text's edge."
    )
    truncate: bool = Field(
        False,
        description="Of a prompt that is longer than the context, read the part next to the text "
        "to come, instead of refusing it.",
    )
    echo: bool = Field(False, description="Give the prompt too, where it stands in the text.")
    logprobs: Annotated[int, Field(ge=0, le=MAX_LIKELIEST)] | None = None
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
    """One message, which a BackChat model answers: see /v1/backchat, which also ranks."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=1024, fail_fast=True)]
    max_tokens: Annotated[int, COUNT] = Field(512, description="Or as many as there is room for.")
    max_completion_tokens: Annotated[int, COUNT] | None = None
    logprobs: _False = False
    response_format: TextFormat | None = None
    store: _False = False


class BackChatRequest(Sampling):
    """A response, for which a backward model writes instructions; or the other way round."""

    max_tokens: Annotated[int, COUNT] = 128
    response: str | None = Field(None, min_length=1, description="For a backward model.")
    instruction: str | None = Field(None, min_length=1, description="For a forward model.")
    n: int = Field(4, ge=1, le=MAX_SAMPLES, description="Samples; different ones are given.")


class ScoreRequest(Request):
    """Whole texts; or instructions for a response; or responses to an instruction."""

    texts: Annotated[list[str], Field(min_length=1, max_length=MAX_SAMPLES)] = Field(
        description="Whole documents, or what a BackChat model would write for what is given."
    )
    response: str | None = Field(None, min_length=1, description="`texts` are instructions for it.")
    instruction: str | None = Field(None, min_length=1, description="`texts` are responses to it.")


class InfillRequest(Body):
    """A text without its middle."""

    beginning: str = Field(min_length=1)
    ending: str = Field(min_length=1)
    n: int = Field(1, ge=1, le=MAX_SAMPLES)
    max_tokens: int = Field(32, ge=1, le=256, description="Of the middle.")
    candidates: int = Field(16, ge=1, le=MAX_SAMPLES, description="Samples of each model.")
    temperature: Annotated[float, TEMPERATURE] = 0.8
    top_k: Annotated[int, TOP_K] = Field(200, description="0 for all.")
    seed: Seed | None = None
