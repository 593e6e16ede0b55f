"""The application: what answers which path."""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from megaback import __version__
from tools.serving import backchat, between, chat, completions, problems, wire
from tools.serving.guard import Guard
from tools.serving.jobs import hanging_up
from tools.serving.service import Service

PAGE_FOLDER = Path(__file__).with_name("page")
_HUNG_UP = Response(status_code=499)
_Answer = TypeVar("_Answer")


class _Stream(StreamingResponse):
    """Server-sent events that end what makes them when the client is gone."""

    media_type = "text/event-stream"

    def __init__(self, service: Service, events: AsyncIterator[str]) -> None:
        super().__init__(events, headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._service, self._events, self._is_complete = service, events, False

    async def stream_response(self, send: Send) -> None:
        await super().stream_response(send)
        self._is_complete = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._events.aclose()  # type: ignore[attr-defined]
            if not self._is_complete:
                self._service.metrics.hung_up()


async def _unless_hung_up(
    service: Service, request: Request, answer: Awaitable[_Answer]
) -> "_Answer | Response":
    """An answer; or nothing, and no further work, when the client is gone."""
    answering = asyncio.ensure_future(answer)
    leaving = asyncio.ensure_future(hanging_up(request))
    try:
        await asyncio.wait({answering, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if answering.done():
            return answering.result()
        service.metrics.hung_up()
        return _HUNG_UP
    finally:
        for task in (answering, leaving):
            task.cancel()
        await asyncio.gather(answering, leaving, return_exceptions=True)


def make_app(service: Service, *, token: str | None, is_loopback: bool) -> FastAPI:
    """The whole server but its sockets. With a token, only who sends it may use the API."""

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
        is_loopback=is_loopback,
    )
    _describe(app, needs_token=token is not None)
    return app


def _add_api(app: FastAPI, service: Service) -> None:
    described = problems.DESCRIBED
    can_infill = service.infiller is not None
    few: problems.Described = {code: described[code] for code in (401, 403)}
    few_and_404: problems.Described = {code: described[code] for code in (401, 403, 404)}

    async def write(asked: completions.Asked, request: Request) -> Response:
        if asked.request.stream:
            return _Stream(service, completions.stream(service, asked))
        answer = await _unless_hung_up(service, request, completions.complete(service, asked))
        if isinstance(answer, Response):
            return answer
        return Response(answer, media_type="application/json")

    @app.get("/v1/models", responses=few)
    async def list_models() -> wire.ModelList:
        """The models that are served, the default one first."""
        return wire.ModelList(
            data=[model.describe(can_infill=can_infill) for model in service.models.values()]
        )

    @app.get("/v1/models/{name}", responses=few_and_404)
    async def show_model(name: str) -> wire.Model:
        """One model."""
        return service.model(name).describe(can_infill=can_infill)

    @app.post(
        "/v1/completions",
        response_model=wire.Completion,
        responses={**described, 200: {"content": {"text/event-stream": {}}}},
    )
    async def complete(asked: wire.CompletionRequest, request: Request) -> Any:
        """Write on from prompts: before them with a backward model, else after them."""
        return await write(await completions.ask(service, asked), request)

    @app.post(
        "/v1/chat/completions",
        response_model=wire.ChatCompletion,
        responses={**described, 200: {"content": {"text/event-stream": {}}}},
    )
    async def converse(asked: wire.ChatRequest, request: Request) -> Any:
        """The instruction for a message; of a forward model, the response to it."""
        return await write(await chat.ask(service, asked), request)

    @app.post("/v1/backchat", response_model=wire.BackChat, responses=described)
    async def answer(asked: wire.BackChatRequest, request: Request) -> Any:
        """Instructions for a response, likely ones first; of a forward model, responses."""
        return await _unless_hung_up(service, request, backchat.answer(service, asked))

    @app.post("/v1/score", response_model=wire.Score, responses=described)
    async def score(asked: wire.ScoreRequest, request: Request) -> Any:
        """How likely a model finds texts."""
        return await _unless_hung_up(service, request, backchat.score(service, asked))

    @app.post("/v1/infill", response_model=wire.Infills, responses=described)
    async def fill(asked: wire.InfillRequest, request: Request) -> Any:
        """Write what comes between a beginning and an ending."""
        return await _unless_hung_up(service, request, between.fill(service, asked))

    @app.get("/metrics", include_in_schema=False)
    async def metrics() -> Response:
        return Response(service.metrics.exposition(), media_type="text/plain; version=0.0.4")

    @app.get("/health", include_in_schema=False)
    async def health() -> Response:
        is_alive = service.engine.is_alive
        return JSONResponse({"status": "ok" if is_alive else "dead"}, 200 if is_alive else 503)


def _describe(app: FastAPI, *, needs_token: bool) -> None:
    """Let the OpenAPI description say what this server answers: 400 where FastAPI says 422."""

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            schema = get_openapi(
                title=app.title,
                version=app.version,
                description=app.description,
                routes=app.routes,
            )
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
