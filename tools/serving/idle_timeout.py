"""Timeouts of connections: for a request to arrive, and for a client to read its answer.

uvicorn has neither: idle connections would use up file descriptors and memory, and answers without
a reader the time of others (docs/decisions/0043-server-limits.md).
"""

import asyncio
import socket
from typing import Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

SECONDS_FOR_A_REQUEST = 20.0
SECONDS_FOR_A_PART = 30.0
MAX_CONNECTIONS = 512
MAX_AHEAD_BYTES = 1 << 16
SYSTEM_BUFFER_BYTES = 1 << 17
"""Send buffer of a socket; Linux doubles it for its own bookkeeping."""


class IdleTimeoutConnection(H11Protocol):
    """An HTTP/1.1 connection that is closed when it is idle or slow.

    Closed when no request arrives in time; when it is the oldest idle one of too many; and when its
    client takes too long to read a part of an answer (64 KiB at most: middleware.py sends no other
    part before), which also cancels the work for that answer.
    """

    seconds_for_a_request: ClassVar[float] = SECONDS_FOR_A_REQUEST
    seconds_for_a_part: ClassVar[float] = SECONDS_FOR_A_PART
    max_connections: ClassVar[int] = MAX_CONNECTIONS

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._opened_s = self.loop.time()
        self._deadline: asyncio.TimerHandle | None = None
        self._read_by: asyncio.TimerHandle | None = None

    @property
    def is_idle(self) -> bool:
        """Whether no request is being answered."""
        return self.cycle is None or self.cycle.response_complete

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # pause_writing is called once the send buffer is full, resume_writing when it is empty.
        transport.set_write_buffer_limits(high=0)
        transport.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_SNDBUF, SYSTEM_BUFFER_BYTES
        )
        self._expect_request()
        if len(self.connections) > self.max_connections:
            idle = [
                one
                for one in self.connections
                if isinstance(one, IdleTimeoutConnection) and one.is_idle
            ]
            oldest = min(idle, key=lambda one: one._opened_s, default=None)
            if oldest is not None:
                oldest.transport.abort()
                self.connections.discard(oldest)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self.is_idle:
            self._expect_request()
            return
        self._stop_expecting()
        if self.conn.their_state is h11.DONE:
            # The next request already: uvicorn would pause reading and miss a disconnect.
            if len(self.conn.trailing_data[0]) > MAX_AHEAD_BYTES:
                self.transport.abort()
            else:
                self.flow.resume_reading()

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._read_by is None:
            self._read_by = self.loop.call_later(self.seconds_for_a_part, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        self._stop_waiting_for_reader()

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_expecting()
        self._stop_waiting_for_reader()
        super().connection_lost(exc)

    def send_400_response(self, msg: str) -> None:
        """Answer an invalid request, or only close if another response has started."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            super().send_400_response(msg)
        else:
            self.transport.abort()
        if not self.is_idle:
            self.cycle.disconnected = True
            self.cycle.message_event.set()

    def _expect_request(self) -> None:
        """Start the timeout of a request, unless it is running: single bytes do not reset it."""
        if self._deadline is None and not self.transport.is_closing():
            self._deadline = self.loop.call_later(self.seconds_for_a_request, self._give_up)

    def _stop_expecting(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None

    def _stop_waiting_for_reader(self) -> None:
        if self._read_by is not None:
            self._read_by.cancel()
            self._read_by = None

    def _give_up(self) -> None:
        self._deadline = None
        if self.is_idle:
            self.transport.abort()
