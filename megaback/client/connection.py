"""HTTP connection to a server of models: JSON requests, and streams of events.

An API key is read from an environment variable. It is sent to the given address only, as redirects
are errors, and appears in no message. Proxies of the environment are used, but not for addresses of
this machine.
"""

import json
import os
import ssl
import threading
import time
from collections.abc import Generator, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urlsplit, urlunsplit
from urllib.request import (
    HTTPRedirectHandler,
    ProxyHandler,
    Request,
    build_opener,
    getproxies,
    proxy_bypass,
)

from data_pipeline.common.checked_json import briefly, parse_json
from data_pipeline.common.loopback import is_loopback
from data_pipeline.errors import ConfigError, ServeError
from data_pipeline.redaction import remember, shown_url

KEY_VARIABLE = "OPENAI_API_KEY"  # also read by lm_eval's and OpenAI's own clients
TIMEOUT_S = 600.0
_BUSY_STATUSES = {429, 502, 503, 504}
_MAX_ATTEMPTS = 4
_FIRST_WAIT_S = 1.0
_MAX_WAIT_S = 30.0
_MAX_REASON_BYTES = 2000
_MAX_ANSWER_BYTES = 128 << 20
_MAX_EVENT_BYTES = 8 << 20


class _NoRedirects(HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        return None


class Connection:
    """The address of a server; each request opens its own connection, so threads may share it."""

    def __init__(
        self, base_url: str, key_variable: str = KEY_VARIABLE, timeout_s: float = TIMEOUT_S
    ) -> None:
        """`timeout_s`: maximum silence of the server.

        Raises ConfigError for an address that is not HTTP or has a login or a query, and for a
        malformed key or time.
        """
        if not 0 < timeout_s <= threading.TIMEOUT_MAX:
            raise ConfigError(f"`timeout_s` is {timeout_s}; give a number of seconds above 0")
        url = base_url.strip().rstrip("/").removesuffix("/v1")
        self.shown = shown_url(url)
        self._timeout_s = timeout_s
        try:
            parts = urlsplit(url)
            is_valid = parts.scheme in ("http", "https") and bool(parts.hostname)
            is_valid = is_valid and (parts.port or 1) > 0
        except ValueError:
            is_valid = False
        if not is_valid:
            raise ConfigError(
                f"{self.shown!r} is no server's address; give one like http://127.0.0.1:8000"
            )
        if parts.username is not None:
            raise ConfigError(f"{self.shown} has a login; give the API key in {key_variable}")
        if parts.query or parts.fragment:
            raise ConfigError(f"{self.shown} is given with a query or a fragment; remove it")
        self._url = urlunsplit(parts._replace(path=quote(parts.path, safe="/%:@!$&'()*+,;=~")))
        self._headers = {"Content-Type": "application/json"}
        if key := os.environ.get(key_variable, "").strip():
            if not (key.isascii() and key.isprintable()):
                raise ConfigError(f"{key_variable} is not an API key: it has other characters")
            remember(key)
            self._headers["Authorization"] = f"Bearer {key}"
        host = parts.hostname or ""
        is_direct = is_loopback(host) or proxy_bypass(host)
        self._proxy = None if is_direct else getproxies().get(parts.scheme)
        proxies = ProxyHandler({} if self._proxy is None else {parts.scheme: self._proxy})
        self._opener = build_opener(_NoRedirects, proxies)

    def ask(self, path: str, fields: Mapping[str, Any] | None = None) -> dict[str, Any]:
        """The JSON of an answer to a GET or, with fields, a POST. Raises ServeError."""
        with self._open(path, fields) as answer, self._receiving():
            return _object_of(_within(answer.read(_MAX_ANSWER_BYTES + 1), _MAX_ANSWER_BYTES))

    def events(self, path: str, fields: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The JSON of each event of a stream. Raises ServeError, also if it is truncated."""
        with self._open(path, fields) as answer, self._receiving():
            while line := _within(answer.readline(_MAX_EVENT_BYTES + 1), _MAX_EVENT_BYTES):
                kind, _, data = line.strip().partition(b":")
                if kind == b"data" and data.strip() == b"[DONE]":
                    return
                if kind in (b"data", b"error"):
                    event = _object_of(data)
                    if "error" in event or kind == b"error":
                        raise ServeError(f"{self.shown} stopped: {_reason(event)}")
                    yield event
        raise ServeError(f"{self.shown} ended a stream early; ask again")

    @contextmanager
    def reading(self, kind: str) -> Iterator[None]:
        """Reading of the fields of answers. Raises ServeError if one is missing or of another type.

        `kind`: the server whose answers they should be.
        """
        try:
            yield
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ServeError(
                f"{self.shown} does not answer as {kind} does ({type(error).__name__}: {error}); "
                "correct the address or the server's `kind`, or update the server"
            ) from None

    @contextmanager
    def _receiving(self) -> Iterator[None]:
        try:
            yield
        except (HTTPException, OSError) as error:
            raise self._broken(error) from None
        except ValueError as error:
            raise ServeError(
                f"{self.shown} does not answer as a server of models does ({error}); correct the "
                "address"
            ) from None

    def _open(self, path: str, fields: Mapping[str, Any] | None) -> Any:
        """An open answer; busy servers are asked again."""
        body = None if fields is None else json.dumps(fields).encode()
        request = Request(self._url + path, body, self._headers)  # noqa: S310 - it is HTTP
        for attempt in range(_MAX_ATTEMPTS):
            try:
                return self._opener.open(request, timeout=self._timeout_s)
            except HTTPError as error:
                with error:
                    if error.code in _BUSY_STATUSES and attempt + 1 < _MAX_ATTEMPTS:
                        _wait(attempt, error.headers.get("Retry-After"))
                        continue
                    if location := error.headers.get("Location"):
                        location = shown_url(location)
                        raise ServeError(
                            f"{self.shown} answers {error.code}: it has moved to {location}; give "
                            "that address"
                        ) from None
                    reason = _reason_in(error)
                raise ServeError(
                    f"{self.shown}{self._by_proxy()} answers {error.code}: {reason}"
                ) from None
            except (URLError, HTTPException, OSError, ValueError) as error:
                reset = isinstance(getattr(error, "reason", error), ConnectionResetError)
                if reset and attempt + 1 < _MAX_ATTEMPTS:
                    _wait(attempt, None)
                    continue
                raise self._broken(error) from None
        raise AssertionError

    def _broken(self, error: Exception) -> ServeError:
        shown = f"{self.shown}{self._by_proxy()}"
        if isinstance(getattr(error, "reason", error), ssl.SSLCertVerificationError):
            return ServeError(
                f"the certificate of {shown} is not trusted ({error}); if it is yours, set "
                "SSL_CERT_FILE to a file with it or its authority's"
            )
        return ServeError(
            f"{shown} does not answer ({error}); start a server there, or correct the address"
        )

    def _by_proxy(self) -> str:
        if self._proxy is None:
            return ""
        return f" by the proxy {shown_url(self._proxy)} (unless no_proxy names the host)"


def _within(data: bytes, max_bytes: int) -> bytes:
    """The data. Raises ValueError if they are too large."""
    if len(data) > max_bytes:
        raise ValueError(f"more than {max_bytes:,} bytes")
    return data


def _object_of(data: bytes) -> dict[str, Any]:
    """Raises ValueError unless the data are a JSON object."""
    value = parse_json(data)
    if not isinstance(value, dict):
        raise ValueError(f"{briefly(value)} is not an object")
    return value


def _wait(attempt: int, asked: str | None) -> None:
    wait_s = _FIRST_WAIT_S * 2**attempt
    if asked is not None and asked.isdecimal():
        wait_s = max(wait_s, int(asked))
    time.sleep(min(wait_s, _MAX_WAIT_S))


def _reason_in(refusal: HTTPError) -> str:
    """The reason of a refusal, as far as it can be read."""
    body = b""
    with suppress(HTTPException, OSError):
        body = refusal.read(_MAX_REASON_BYTES)
    with suppress(ValueError):
        return _reason(parse_json(body))
    return body.decode("utf-8", "replace") or refusal.reason


def _reason(body: Any) -> str:
    """The message in an error of OpenAI's form, of FastAPI's, or the whole."""
    with suppress(KeyError, TypeError):
        return str(body["error"]["message"])
    with suppress(KeyError, TypeError):
        return str(body["message"])
    return json.dumps(body)[:_MAX_REASON_BYTES]
