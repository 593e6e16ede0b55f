"""Response schemas: OpenAI's completions, and megaback's additions."""

from typing import Literal

from pydantic import BaseModel, Field


class LogProbs(BaseModel):
    """Log probabilities of tokens in writing order: right to left for a backward model."""

    tokens: list[str] = Field(description="`bytes:\\xe2` and so on for a part of a character.")
    token_logprobs: list[float | None] = Field(
        description="In nats, at temperature 1, among all tokens; null for the first of a prompt "
        "of ids."
    )
    top_logprobs: list[dict[str, float] | None] | None
    text_offset: list[int] = Field(
        description="Where the token's text begins, in characters from the beginning of the "
        "prompt: negative for what stands before it."
    )


class Choice(BaseModel):
    index: int
    text: str
    logprobs: LogProbs | None = None
    finish_reason: Literal["stop", "length"] | None = None
    token_ids: list[int] | None = Field(
        None, description="With `return_token_ids`: new ids, without an end marker."
    )
    prompt_token_ids: list[int] | None = Field(
        None, description="With `return_token_ids`: ids that were read; in a stream, at its end."
    )


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Completion(BaseModel):
    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[Choice]
    usage: Usage | None = None
    seed: int = Field(description="With which the same request gives the same again.")


class ChatAnswer(BaseModel):
    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    index: int
    message: ChatAnswer
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage | None = None
    seed: int = Field(description="With which the same request gives the same again.")


class ChatDelta(BaseModel):
    role: str | None = None
    content: str


class ChatChunkChoice(BaseModel):
    index: int
    delta: ChatDelta
    logprobs: None = None
    finish_reason: Literal["stop", "length"] | None = None


class ChatChunk(BaseModel):
    """An event of a stream."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    seed: int


class Candidate(BaseModel):
    text: str
    log_probability: float = Field(description="log P(text and its end | what was given), in nats.")
    tokens: int
    is_complete: bool = Field(description="Whether the model ended it, or it was cut.")


class BackChat(BaseModel):
    object: Literal["backchat"] = "backchat"
    model: str
    candidates: list[Candidate] = Field(description="Ended ones first, then the likeliest first.")
    usage: Usage
    seed: int


class TextScore(BaseModel):
    log_probability: float = Field(description="Of the text and its end, in nats, natural log.")
    tokens: int
    bytes: int
    bits_per_byte: float | None = Field(description="None for an empty text.")


class Score(BaseModel):
    object: Literal["score"] = "score"
    model: str
    scores: list[TextScore]


class Infill(BaseModel):
    middle: str
    score: float = Field(description="Score in nats per token; higher is better.")
    forward: float = Field(description="log P(middle and ending | beginning), in nats.")
    backward: float = Field(description="log P(middle and beginning | ending), in nats.")
    forward_tokens: int
    backward_tokens: int
    written_forward: int | None
    written_backward: int | None


class Infills(BaseModel):
    object: Literal["infill"] = "infill"
    infills: list[Infill] = Field(description="Different ones, the best first; maybe none.")
    seed: int


class Model(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: Literal["megaback"] = "megaback"
    direction: Literal["backward", "forward"]
    unit: Literal["token", "word"]
    tokenizer_sha256: str = Field(description="Of its `tokenizer.model`.")
    context_tokens: int
    parameters: int
    dtype: str = Field(description="Data type of the weights.")
    can_infill: bool = Field(description="Together with the other model: /v1/infill.")


class ModelList(BaseModel):
    object: Literal["list"] = "list"
    data: list[Model]


class Problem(BaseModel):
    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ProblemBody(BaseModel):
    error: Problem
