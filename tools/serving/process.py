"""The server process and its graceful shutdown."""

import asyncio
import math
import signal
import socket
from types import FrameType

import uvicorn

from tools.serving.app import make_app
from tools.serving.context import Service
from tools.serving.host_names import Address
from tools.serving.idle_timeout import IdleTimeoutConnection

_SECONDS_TO_FINISH = 2.0
"""Seconds for clients to read interrupted responses."""
_SECONDS_TO_CLOSE = 10.0


class Server(uvicorn.Server):
    """uvicorn's server; on shutdown, requests have `shutdown_s` seconds to finish.

    Those that still run are then answered as when their deadline passes.
    """

    def __init__(
        self,
        service: Service,
        shutdown_s: float,
        *,
        token: str | None = None,
        allowed: tuple[Address, ...] = (),
        log_level: str = "warning",
    ) -> None:
        config = uvicorn.Config(
            make_app(service, token=token, allowed=allowed),
            http=IdleTimeoutConnection,
            ws="none",
            log_config=None,
            log_level=log_level,
            access_log=False,
            use_colors=False,
            server_header=False,
            proxy_headers=False,
            timeout_keep_alive=30,
            timeout_graceful_shutdown=math.ceil(
                shutdown_s + _SECONDS_TO_FINISH + _SECONDS_TO_CLOSE
            ),
        )
        super().__init__(config)
        self._service, self._shutdown_s = service, shutdown_s
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        ending = asyncio.get_running_loop().call_later(self._shutdown_s, self._end)
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Exit at once on a second Ctrl-C."""
        if self.should_exit and sig == signal.SIGINT and self._loop is not None:
            self._loop.call_soon_threadsafe(self._end)
        else:
            super().handle_exit(sig, frame)

    def _end(self) -> None:
        self._service.end()
        asyncio.get_running_loop().call_later(_SECONDS_TO_FINISH, self._close_connections)

    def _close_connections(self) -> None:
        for connection in list(self.server_state.connections):
            connection.transport.abort()
