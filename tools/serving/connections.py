"""Connections that do not stay open for nothing.

uvicorn waits without end for a request's first line and headers, so that connections that are
opened and left would use up the files that a process may open.
"""

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.h11_impl import H11Protocol

_SECONDS_FOR_A_REQUEST = 20.0
_MOST_CONNECTIONS = 512


class ImpatientConnection(H11Protocol):
    """Ends when no request has come in time or, as the oldest idle one, when there are too many."""

    seconds_for_a_request: ClassVar[float] = _SECONDS_FOR_A_REQUEST
    most_connections: ClassVar[int] = _MOST_CONNECTIONS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._opened_s = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._expect_request()
        if len(self.connections) > self.most_connections:
            idle = [
                one
                for one in self.connections
                if isinstance(one, ImpatientConnection) and one.is_idle
            ]
            oldest = min(idle, key=lambda one: one._opened_s, default=None)
            if oldest is not None:
                oldest.transport.abort()
                self.connections.discard(oldest)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_idle:
            self._expect_request()
        else:
            self._stop_expecting()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        super().connection_lost(exc)

    def _expect_request(self) -> None:
        """From now on, if not already: a byte now and then wins no time."""
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.seconds_for_a_request, self._give_up)

    def _stop_expecting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.is_idle:
            self.transport.abort()
