"""FastAPI application: the handler of each path."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from pydantic.json_schema import models_json_schema
from starlette.types import Receive, Scope, Send

from megaback import __version__
from tools.serving import backchat, chat, completions, response_schemas, schemas
from tools.serving import errors as problems
from tools.serving import infill as between
from tools.serving.context import Service
from tools.serving.deadline import Deadline, EndedError, hanging_up, unless
from tools.serving.host_names import Address
from tools.serving.middleware import Guard
from tools.serving.parsing import REQUESTS, parse_body

PAGE_FOLDER = Path(__file__).with_name("page")
_REFERENCE = "#/components/schemas/{model}"
_MAX_BYTES_PARSED_AT_ONCE = 1 << 16
"""Maximum bytes of a body parsed on the event loop; longer ones are parsed in a thread."""
_Body = TypeVar("_Body", bound=schemas.Body)


class _Stream(StreamingResponse):
    """Server-sent events of the text that a job writes.

    The job starts before anything is sent, so that a full server answers with an error status, and
    it ends when the client disconnects.
    """

    media_type = "text/event-stream"

    def __init__(self, service: Service, asked: completions.Asked, deadline: Deadline) -> None:
        self._job = completions.job_of(service, asked, deadline)
        self._events = completions.stream(service, asked, self._job)
        self._service, self._deadline, self._is_complete = service, deadline, False
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(self._events, headers=headers)

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self._is_complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._job:
                try:
                    await super().__call__(scope, receive, send)
                finally:
                    await self._events.aclose()
                    if not self._is_complete:
                        self._service.metrics.hung_up()
        finally:
            self._deadline.close()


def make_app(
    service: Service, *, token: str | None = None, allowed: Sequence[Address] = ()
) -> FastAPI:
    """The server without its sockets. With a token, only requests that send it may use the API.

    Without one, the Host of a request must be a loopback name or one of `allowed`.
    """

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        service.engine.start()
        yield
        await asyncio.get_running_loop().run_in_executor(None, service.close)

    app = FastAPI(
        title="megaback",
        version=__version__,
        description="Models that write backwards, with OpenAI's completions.",
        docs_url=None,
        redoc_url=None,
        lifespan=lifespan,
    )
    problems.install(app)
    _add_api(app, service)
    paths = [route.path for route in app.routes if hasattr(route, "path")]
    app.mount("/", StaticFiles(directory=PAGE_FOLDER, html=True), name="page")
    app.add_middleware(
        Guard,
        limits=service.limits,
        metrics=service.metrics,
        paths=paths,
        token=token,
        allowed=allowed,
    )
    _describe(app, needs_token=token is not None)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    described = problems.DESCRIBED
    can_infill = service.infiller is not None
    few: problems.Described = {code: described[code] for code in (401, 403)}
    few_and_404: problems.Described = {code: described[code] for code in (401, 403, 404)}

    async def answered(
        request: Request, kind: type[_Body], answer: Callable[[_Body, Deadline], Awaitable[Any]]
    ) -> Any:
        """The response to a request body, unless the client disconnects first."""
        deadline = service.deadline()
        found = None
        body = await request.body()

        async def work() -> Any:
            if len(body) > _MAX_BYTES_PARSED_AT_ONCE:
                asked = await service.aside(partial(parse_body, kind, body))
            else:
                asked = parse_body(kind, body)
            return await answer(asked, deadline)

        try:
            found = await unless(hanging_up(request), work())
        except EndedError:
            service.metrics.hung_up()
            found = Response(status_code=499)
        finally:
            if not isinstance(found, _Stream):  # which continues
                deadline.close()
        return found

    async def written(asked: completions.Asked, deadline: Deadline) -> Response:
        if asked.request.stream:
            return _Stream(service, asked, deadline)
        answer = await completions.complete(service, asked, deadline)
        return Response(answer, media_type="application/json")

    @app.get("/v1/models", responses=few)
    async def list_models() -> response_schemas.ModelList:
        """The served models, the default one first."""
        return response_schemas.ModelList(
            data=[model.describe(can_infill=can_infill) for model in service.models.values()]
        )

    @app.get("/v1/models/{name}", responses=few_and_404)
    async def show_model(name: str) -> response_schemas.Model:
        """One model."""
        return service.model(name).describe(can_infill=can_infill)

    @app.post(
        "/v1/completions",
        response_model=response_schemas.Completion,
        responses={**described, 200: {"content": {"text/event-stream": {}}}},
        openapi_extra=_takes(schemas.CompletionRequest),
    )
    async def complete(request: Request) -> Any:
        """Continue prompts: before them with a backward model, after them with a forward one."""

        async def write(asked: schemas.CompletionRequest, deadline: Deadline) -> Response:
            return await written(await completions.ask(service, asked, deadline), deadline)

        return await answered(request, schemas.CompletionRequest, write)

    @app.post(
        "/v1/chat/completions",
        response_model=response_schemas.ChatCompletion,
        responses={**described, 200: {"content": {"text/event-stream": {}}}},
        openapi_extra=_takes(schemas.ChatRequest),
    )
    async def converse(request: Request) -> Any:
        """The instruction for a message; with a forward model, the response to it."""

        async def write(asked: schemas.ChatRequest, deadline: Deadline) -> Response:
            return await written(await chat.ask(service, asked), deadline)

        return await answered(request, schemas.ChatRequest, write)

    @app.post(
        "/v1/backchat",
        response_model=response_schemas.BackChat,
        responses=described,
        openapi_extra=_takes(schemas.BackChatRequest),
    )
    async def answer(request: Request) -> Any:
        """Instructions for a response, likeliest first; with a forward model, responses."""
        return await answered(request, schemas.BackChatRequest, partial(backchat.answer, service))

    @app.post(
        "/v1/score",
        response_model=response_schemas.Score,
        responses=described,
        openapi_extra=_takes(schemas.ScoreRequest),
    )
    async def score(request: Request) -> Any:
        """Log probabilities of texts."""
        return await answered(request, schemas.ScoreRequest, partial(backchat.score, service))

    @app.post(
        "/v1/infill",
        response_model=response_schemas.Infills,
        responses=described,
        openapi_extra=_takes(schemas.InfillRequest),
    )
    async def fill(request: Request) -> Any:
        """Write the text between a beginning and an ending."""
        return await answered(request, schemas.InfillRequest, partial(between.fill, service))

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4")

    @app.get("/health", include_in_schema=False)
    async def health() -> Response:
        is_alive = service.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else "dead"}, 200 if is_alive else 503)


def _takes(kind: type[schemas.Body]) -> dict[str, Any]:
    """OpenAPI description of a path's body, which parsing.py reads."""
    schema = {"$ref": _REFERENCE.format(model=kind.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _describe(app: FastAPI, *, needs_token: bool) -> None:
    """Make the OpenAPI description match the server's answers: 400 in place of FastAPI's 422."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
            _, defined = models_json_schema(
                [(kind, "validation") for kind in REQUESTS.values()], ref_template=_REFERENCE
            )
            schema["components"]["schemas"] |= defined["$defs"]
            for operations in schema["paths"].values():
                for operation in operations.values():
                    operation["responses"].pop("422", None)
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
            schemes = {"token": {"type": "http", "scheme": "bearer"}}
            schema["components"]["securitySchemes"] = schemes
            schema["security"] = [{"token": []}] if needs_token else [{}, {"token": []}]
            app.openapi_schema = schema
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
