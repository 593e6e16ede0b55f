"""Checks of every request: host, origin, token, open requests, size and time of its body.

Pure ASGI, so that no body is read before its request is allowed.
"""

import asyncio
import hmac
import time
from collections.abc import Iterator, Sequence

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tools.serving.errors import ProblemError, busy
from tools.serving.host_names import Address, refusal
from tools.serving.prometheus import Metrics
from tools.serving.request_limits import Limits

_API_PATHS = ("/v1/", "/metrics")
# Bytes of a too large body that are read and discarded: clients that are sending see no answer.
_MAX_PASSED_OVER_BYTES = 64 << 20
_MAX_HEAD_BYTES = 1 << 14
# Bytes of a response part that the client must read in time: see idle_timeout.py.
_PART_BYTES = 1 << 16
_PAGE_POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self'",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types 'none'",
    )
)
_HEADERS = {
    "content-security-policy": _PAGE_POLICY,
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
    "permissions-policy": "camera=(), geolocation=(), microphone=()",
}


class Guard:
    """ASGI middleware that checks requests, and adds headers and metrics."""

    def __init__(
        self,
        app: ASGIApp,
        *,
        limits: Limits,
        metrics: Metrics,
        paths: Sequence[str],
        token: str | None,
        allowed: Sequence[Address],
    ) -> None:
        """`paths` are labels of metrics. With a token, API requests must send it.

        Without one, the Host of a request must be a loopback name or one of `allowed`.
        """
        self._app, self._limits, self._metrics = app, limits, metrics
        self._paths = frozenset(paths)
        self._token = None if token is None else token.encode()
        self._allowed = allowed
        self._num_open = 0
        self._arriving: dict[asyncio.Task[bytes], None] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started_s = time.monotonic()
        status = 500

        async def send_with_headers(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = MutableHeaders(scope=message)
                for name, value in _HEADERS.items():
                    headers.setdefault(name, value)
            for part in _parts(message):
                await send(part)

        path = scope["path"]
        if scope["method"] == "HEAD":  # is GET, whose body uvicorn omits
            scope = {**scope, "method": "GET"}
        self._metrics.opened()
        try:
            await self._pass(scope, receive, send_with_headers)
        except ProblemError as problem:
            await problem.response()(scope, receive, send_with_headers)
        finally:
            seconds = time.monotonic() - started_s
            self._metrics.answered(path if path in self._paths else "other", status, seconds)

    async def _pass(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = Headers(scope=scope)
        _require_short_head(scope)
        self._require_here(headers)
        if not scope["path"].startswith(_API_PATHS):
            await self._app(scope, receive, send)
            return
        self._require_token(headers)
        if scope["path"] == "/metrics":
            await self._app(scope, receive, send)
            return
        if self._num_open >= self._limits.open_requests:
            raise busy(f"{self._num_open} requests are open already; try again")
        content_type = headers.get("content-type") or "application/json"
        if scope["method"] == "POST" and not _is_json(content_type):
            raise ProblemError(
                415,
                f"the body's Content-Type is {content_type[:100]!r}; send JSON, and "
                "the header Content-Type: application/json",
            )
        encoding = headers.get("content-encoding", "identity")
        if encoding.lower() != "identity":
            raise ProblemError(
                415,
                f"the body's Content-Encoding is {encoding[:100]!r}; send it without compression",
            )
        body = await self._body(headers, receive)
        # A slow body takes no slot of the requests that have arrived.
        if self._num_open >= self._limits.open_requests:
            raise busy(f"{self._num_open} requests are open already; try again")
        self._num_open += 1
        try:
            await self._app(scope, _after(body, receive), send)
        finally:
            self._num_open -= 1

    def _require_here(self, headers: Headers) -> None:
        """Refuse cross-site requests of browsers.

        Not checked with a token, which such a page lacks: a proxy may then use any name.
        """
        if self._token is None:
            host, origins = headers.get("host", ""), headers.getlist("origin")
            if (why := refusal(host, origins, self._allowed)) is not None:
                raise ProblemError(403, why)

    def _require_token(self, headers: Headers) -> None:
        if self._token is None:
            return
        scheme, _, sent = headers.get("authorization", "").partition(" ")
        is_right = hmac.compare_digest(sent.strip().encode(), self._token)
        if scheme.lower() != "bearer" or not is_right:
            raise ProblemError(
                401,
                "send the server's token as Authorization: Bearer TOKEN",
                "invalid_api_key",
                {"WWW-Authenticate": "Bearer"},
            )

    async def _body(self, headers: Headers, receive: Receive) -> bytes:
        """The body, within the time limit; the oldest is dropped when too many are arriving."""
        if len(self._arriving) >= self._limits.open_requests:
            first = next(iter(self._arriving))
            del self._arriving[first]
            first.cancel()
        reading = asyncio.ensure_future(self._read(headers, receive))
        self._arriving[reading] = None
        try:
            await asyncio.wait({reading}, timeout=self._limits.body_s)
            if not reading.done() or reading.cancelled():
                raise ProblemError(408, "the body did not arrive in time")
            return reading.result()
        finally:
            self._arriving.pop(reading, None)
            reading.cancel()
            await asyncio.gather(reading, return_exceptions=True)

    async def _read(self, headers: Headers, receive: Receive) -> bytes:
        maximum = self._limits.body_bytes
        body, passed_over, is_over = bytearray(), 0, False
        announced = headers.get("content-length", "")
        is_too_large = announced.isdecimal() and int(announced) > maximum
        if is_too_large and headers.get("expect", "").lower() == "100-continue":
            is_over = True  # The client has sent nothing and waits for 100 Continue.
        while not is_over:
            message = await receive()
            if message["type"] != "http.request":
                raise ProblemError(400, "the client disconnected")
            is_over = not message.get("more_body", False)
            part = message.get("body", b"")
            is_too_large = is_too_large or len(body) + len(part) > maximum
            if is_too_large:
                body.clear()
                passed_over += len(part)
                is_over = is_over or passed_over > _MAX_PASSED_OVER_BYTES
            else:
                body += part
        if is_too_large:
            raise ProblemError(413, f"the body exceeds {maximum} bytes; send less")
        return bytes(body)


def _require_short_head(scope: Scope) -> None:
    """Raises ProblemError (431). h11 limits only heads that arrive in parts."""
    fields = sum(len(name) + len(value) for name, value in scope["headers"])
    if fields + len(scope["raw_path"]) + len(scope["query_string"]) > _MAX_HEAD_BYTES:
        raise ProblemError(
            431, f"the request line and headers exceed {_MAX_HEAD_BYTES} bytes; send less"
        )


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (
        kind.startswith("application/") and kind.endswith("+json")
    )


def _parts(message: Message) -> Iterator[Message]:
    """Split a large body, so that a client that does not read is noticed between parts."""
    body = message.get("body", b"")
    while len(body) > _PART_BYTES:
        yield {**message, "body": body[:_PART_BYTES], "more_body": True}
        body = body[_PART_BYTES:]
    yield {**message, "body": body} if "body" in message else message


def _after(body: bytes, receive: Receive) -> Receive:
    """Replay a body that was read, then forward later messages."""
    is_given = False

    async def receive_again() -> Message:
        nonlocal is_given
        if is_given:
            return await receive()
        is_given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return receive_again
