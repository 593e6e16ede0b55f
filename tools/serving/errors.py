"""Errors in OpenAI's format: a status, and JSON with message, type and field."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.routing import Route

from data_pipeline.common.device_memory import failed_allocation
from data_pipeline.errors import ConfigError, PromptError
from data_pipeline.text.incremental import sendable
from tools.serving import response_schemas

_log = logging.getLogger("megaback.serve")
_MAX_SHOWN_CHARACTERS = 100
Described = dict[int | str, dict[str, Any]]
"""Error responses by status, for the OpenAPI description."""
DESCRIBED: Described = {
    400: {"model": response_schemas.ProblemBody, "description": "The request is invalid."},
    401: {"model": response_schemas.ProblemBody, "description": "The token is missing or wrong."},
    403: {"model": response_schemas.ProblemBody, "description": "The request is cross-site."},
    404: {
        "model": response_schemas.ProblemBody,
        "description": "The model or path does not exist.",
    },
    413: {"model": response_schemas.ProblemBody, "description": "The body is too large."},
    415: {"model": response_schemas.ProblemBody, "description": "The body is not JSON."},
    503: {
        "model": response_schemas.ProblemBody,
        "description": "Too many requests, or the deadline has passed.",
    },
}


class ProblemError(Exception):
    """An error response."""

    def __init__(
        self,
        status: int,
        message: str,
        code: str | None = None,
        headers: Mapping[str, str] | None = None,
        param: str | None = None,
    ) -> None:
        """`param`: the wrong field of the body, if any."""
        super().__init__(message)
        self.status, self.message, self.code, self.headers = status, message, code, headers
        self.param = param

    def response(self) -> JSONResponse:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        problem = response_schemas.Problem(
            message=self.message, type=kind, param=self.param, code=self.code
        )
        body = response_schemas.ProblemBody(error=problem).model_dump()
        return JSONResponse(body, self.status, self.headers)


def busy(message: str) -> ProblemError:
    return ProblemError(503, message, "overloaded", {"Retry-After": "1"})


def defect(error: BaseException, message: str) -> ProblemError:
    """The answer to a request whose work failed: 503 if its device is out of memory, else 500."""
    if any(failed_allocation(one) for one in (error, error.__cause__) if one is not None):
        return busy(
            "the device is out of memory; send fewer or shorter texts, or ask for fewer samples"
        )
    return ProblemError(500, f"{message}; the server's log has the reason")


def install(app: FastAPI) -> None:
    """Answer every error of this application in this form."""

    @app.exception_handler(ProblemError)
    async def on_problem(_request: Request, error: ProblemError) -> JSONResponse:
        return error.response()

    @app.exception_handler(PromptError)
    @app.exception_handler(ConfigError)
    async def on_wrong_value(_request: Request, error: Exception) -> JSONResponse:
        return ProblemError(400, str(error), "invalid_value").response()

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, error: HTTPException) -> JSONResponse:
        if error.status_code in (404, 405):
            return _unanswered(app, request).response()
        return ProblemError(error.status_code, str(error.detail), headers=error.headers).response()

    @app.exception_handler(Exception)
    async def on_defect(_request: Request, error: Exception) -> JSONResponse:
        _log.error("unhandled error in a request", exc_info=error)
        return defect(error, "internal error").response()


def _unanswered(app: FastAPI, request: Request) -> ProblemError:
    """The 405 with a path's methods, or the 404; the mount of the page gives neither."""
    path = request.url.path
    shown = sendable(path[:_MAX_SHOWN_CHARACTERS])
    methods = {
        method
        for route in app.routes
        if isinstance(route, Route) and route.path_regex.match(path)
        for method in route.methods or ()
    }
    if methods and request.method not in methods:
        allowed = ", ".join(sorted(methods))
        message = f"{shown} takes {allowed}, not {sendable(request.method)}"
        return ProblemError(405, message, headers={"Allow": allowed})
    return ProblemError(404, f"{shown} does not exist; see /openapi.json")
