"""Retries of network requests: transient errors, backoff and logging.

Every request of a source uses `with_retries`. Permanent errors, such as a missing file or a denied
permission, are raised immediately.
"""

import asyncio
import errno
import logging
import socket
import ssl
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar
from urllib.parse import urlsplit
from urllib.request import getproxies, proxy_bypass

from data_pipeline.errors import SourceUnreadableError
from data_pipeline.redaction import scrub

Result = TypeVar("Result")

_LOG = logging.getLogger("megaback.sources")
TRANSIENT_STATUSES = {408, 425, 429, *range(500, 600)}
_TRANSIENT_ERRNOS = {
    *(errno.EAGAIN, errno.EBUSY, errno.EIO, errno.ETIMEDOUT, errno.EPIPE),
    *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET),
    *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETUNREACH),
}
# Drivers of file systems are not dependencies: their errors are recognized by name.
_TRANSIENT_NAMES = {
    *("ClientPayloadError", "ClientConnectionError"),  # aiohttp
    "TransportError",  # httpx
    *("HTTPClientError", "IncompleteRead", "ResponseStreamingError"),  # botocore, urllib3
    *("ServiceRequestError", "ServiceResponseError"),  # azure
    *("ChunkedEncodingError", "ConnectionError", "Timeout"),  # requests
}
_LASTING_NAMES = {"OfflineModeIsEnabled", "InvalidURL", "UnsupportedProtocol"}


@dataclass(frozen=True)
class RetryPolicy:
    """Limits of attempts, waits and timeouts of a request."""

    max_attempts: int = 8
    first_wait_s: float = 1.0
    """Maximum wait before the second attempt; doubled for each further one."""
    max_wait_s: float = 60.0
    max_total_s: float = 600.0
    """No attempt begins later than this."""
    stall_timeout_s: float = 60.0
    """Timeout for an HTTP server that sends nothing."""
    request_timeout_s: float = 300.0
    """Timeout for drivers that cannot distinguish stalled from slow requests."""
    listing_timeout_s: float = 1800.0
    """Timeout for listing a whole folder."""
    max_unresolved_attempts: int = 3
    """Maximum attempts at a host that cannot be resolved: mostly there is no network."""
    max_unresolved_s: float = 10.0
    """No attempt at such a host begins later than this."""


POLICY = RetryPolicy()


class TransientError(Exception):
    """A request failed temporarily; `wait_s`: delay that the server requested."""

    def __init__(self, reason: str, wait_s: float = 0.0) -> None:
        super().__init__(reason)
        self.wait_s = wait_s


class UnresolvedHostError(TransientError):
    """The name of a host cannot be resolved."""


def require_host(url: str) -> None:
    """Resolve the host of an address, or its proxy. Raises UnresolvedHostError.

    Called before libraries that would retry for minutes themselves.
    """
    parts = urlsplit(url)
    host = parts.hostname or ""
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if proxy and not proxy_bypass(host):
        host = urlsplit(proxy if "://" in proxy else f"//{proxy}").hostname or ""
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UnresolvedHostError(f"cannot resolve the host {host} ({reason})") from None


def require_hub() -> None:
    """Resolve the hub's host and silence its library's retries. Raises UnresolvedHostError.

    The library sends each request six times within half a minute and logs two lines each.
    """
    from huggingface_hub import constants

    logging.getLogger("huggingface_hub.utils._http").setLevel(logging.ERROR)
    require_host(constants.ENDPOINT)


def with_retries(what: str, attempt: Callable[[], Result]) -> Result:
    """Call `attempt` until it succeeds, with retries after transient errors.

    Each retry is logged in one line that begins with `what`. Raises SourceUnreadableError when the
    policy's limits are exceeded, and permanent errors of `attempt` unchanged.
    """
    import tenacity

    policy = POLICY
    begin = time.monotonic()

    def limits(state: tenacity.RetryCallState) -> tuple[int, float]:
        if state.outcome is not None and is_unresolved(state.outcome.exception()):
            return policy.max_unresolved_attempts, policy.max_unresolved_s
        return policy.max_attempts, policy.max_total_s

    def is_enough(state: tenacity.RetryCallState) -> bool:
        attempts, total_s = limits(state)
        return state.attempt_number >= attempts or (state.seconds_since_start or 0.0) >= total_s

    def log(state: tenacity.RetryCallState) -> None:
        error = state.outcome.exception() if state.outcome else None
        wait_s = state.next_action.sleep if state.next_action else 0.0
        _LOG.warning(
            "%s: %s; retrying in %.1f s (attempt %d of %d failed)",
            *(what, reason_of(error), wait_s, state.attempt_number, limits(state)[0]),
        )

    def wait_s(state: tenacity.RetryCallState) -> float:
        error = state.outcome.exception() if state.outcome else None
        asked_s = error.wait_s if isinstance(error, TransientError) else 0.0
        return max(backoff(state), min(asked_s, policy.max_wait_s))

    # Half of the wait is random, so that many readers do not retry at the same time.
    half = {"multiplier": policy.first_wait_s / 2, "max": policy.max_wait_s / 2}
    backoff = tenacity.wait_exponential(**half) + tenacity.wait_random_exponential(**half)
    retrying = tenacity.Retrying(
        retry=tenacity.retry_if_exception(is_transient),
        stop=is_enough,
        wait=wait_s,
        before_sleep=log,
        reraise=False,
    )
    try:
        return retrying(attempt)
    except tenacity.RetryError as error:
        last = error.last_attempt
        raise SourceUnreadableError(
            f"{what}: {reason_of(last.exception())}; gave up after {last.attempt_number} attempts "
            f"in {time.monotonic() - begin:.0f} s; check the network and the server, "
            "then run the command again"
        ) from None


def is_transient(error: BaseException) -> bool:
    """Whether a retry may succeed."""
    if isinstance(error, TransientError):
        return True
    causes = list(_causes(error))
    if any(_names(cause) & _LASTING_NAMES for cause in causes):
        return False
    for cause in causes:
        if _names(cause) & _TRANSIENT_NAMES:
            return _passes(cause)
    # A driver may wrap a refusal in a general error: the underlying status takes precedence.
    statuses = [status for cause in causes if (status := _status(cause)) is not None]
    if statuses:
        return statuses[0] in TRANSIENT_STATUSES
    return any(_passes(cause) for cause in causes)


def is_unresolved(error: BaseException | None) -> bool:
    """Whether the host's name could not be resolved."""
    return error is not None and any(
        isinstance(cause, UnresolvedHostError)
        or isinstance(getattr(cause, "os_error", cause), socket.gaierror)
        for cause in _causes(error)
    )


def reason_of(error: BaseException | None) -> str:
    """One-line description of an error, without secrets of addresses."""
    if isinstance(error, TimeoutError | asyncio.TimeoutError) and not str(error):
        return "timeout"
    text = (getattr(error, "strerror", None) or str(error)).strip().split("\n", maxsplit=1)[0]
    return scrub(text.rstrip(".")) or type(error).__name__


def _passes(error: BaseException) -> bool:
    if isinstance(error, ssl.SSLCertVerificationError):
        return False
    cause = getattr(error, "os_error", error)  # aiohttp's cause of a failed connection
    if isinstance(cause, socket.gaierror):
        return cause.errno == socket.EAI_AGAIN  # otherwise the host does not exist
    if isinstance(error, ConnectionError | TimeoutError | asyncio.TimeoutError):
        return True
    if isinstance(error, asyncio.IncompleteReadError) or _names(error) & _TRANSIENT_NAMES:
        return True
    return isinstance(error, OSError) and error.errno in _TRANSIENT_ERRNOS


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__


def _names(error: BaseException) -> set[str]:
    return {parent.__name__ for parent in type(error).__mro__}


def _status(error: BaseException) -> int | None:
    """HTTP status of a driver's error, or None."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        response = response.get("ResponseMetadata", {})
        value = response.get("HTTPStatusCode")
    else:
        value = getattr(response, "status_code", None)
    for name in ("status", "status_code", "code"):
        value = value if value is not None else getattr(error, name, None)
    try:
        status = int(value) if value is not None else None
    except (TypeError, ValueError):  # a code that is a word
        return None
    return status if status is not None and 100 <= status < 600 else None
