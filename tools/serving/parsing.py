"""Parsing of request bodies, with errors that name the field."""

import json
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from pydantic import ValidationError

from data_pipeline.common.number_ranges import finite_json
from data_pipeline.text.incremental import sendable
from tools.serving import schemas
from tools.serving.errors import ProblemError

REQUESTS: Mapping[str, type[schemas.Body]] = {
    "/v1/completions": schemas.CompletionRequest,
    "/v1/chat/completions": schemas.ChatRequest,
    "/v1/backchat": schemas.BackChatRequest,
    "/v1/score": schemas.ScoreRequest,
    "/v1/infill": schemas.InfillRequest,
}
_MAX_SHOWN_PROBLEMS = 3
_MAX_SHOWN_CHARACTERS = 100
_MAX_FIELDS = 64
"""Maximum fields of a body: each unknown one would be a separate validation error."""
_Body = TypeVar("_Body", bound=schemas.Body)


def parse_body(kind: type[_Body], body: bytes) -> _Body:
    """Raises ProblemError."""
    try:
        values = finite_json(body.decode())
    except UnicodeDecodeError as error:
        what = f"the body is not UTF-8 from byte {error.start + 1}; send JSON in UTF-8"
        raise _wrong(what) from None
    except RecursionError:
        raise _wrong("the body is nested too deeply; send flat JSON") from None
    except json.JSONDecodeError as error:
        raise _wrong(f"the body is not JSON from character {error.pos + 1}") from None
    except ValueError as error:
        why = sendable(str(error))[:_MAX_SHOWN_CHARACTERS]
        raise _wrong(f"the body cannot be read as JSON: {why}") from None
    if not isinstance(values, dict):
        raise _wrong("the body is not a JSON object; send one, such as {}")
    if len(values) > _MAX_FIELDS:
        raise _wrong(f"the body has {len(values)} fields; the limit is {_MAX_FIELDS}")
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problems = error.errors(include_url=False, include_context=False, include_input=False)
        raise _wrong(_describe(problems), _param(problems)) from None


def _wrong(message: str, param: str | None = None) -> ProblemError:
    return ProblemError(400, message, "invalid_value", param=param)


def _param(problems: Sequence[Any]) -> str | None:
    """The first wrong field, by its top-level name."""
    for problem in problems:
        if problem["loc"]:
            return sendable(str(problem["loc"][0])[:_MAX_SHOWN_CHARACTERS])
    return None


def _describe(problems: Sequence[Any]) -> str:
    """The first problems and their fields, without the values, which may be any text."""
    described = []
    for problem in problems[:_MAX_SHOWN_PROBLEMS]:
        where = ".".join(str(part) for part in problem["loc"])
        if len(where) > _MAX_SHOWN_CHARACTERS:
            where = f"{where[:_MAX_SHOWN_CHARACTERS]}..."
        described.append(f"{where or 'the body'}: {problem['msg']}")
    more = len(problems) - len(described)
    return sendable("; ".join(described) + (f"; and {more} more" if more > 0 else ""))
