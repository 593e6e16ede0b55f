"""Cancellation of a request: by its timeout, its client, or the server's shutdown."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from starlette.requests import Request

from tools.serving.errors import ProblemError, busy

_Result = TypeVar("_Result")


class EndedError(Exception):
    """Raised by `unless` when its ending comes first."""


async def unless(ending: Awaitable[object], work: Awaitable[_Result]) -> _Result:
    """The result of some work, which is canceled with its caller.

    Raises EndedError, and cancels the work, when `ending` is over first.
    """
    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(ending)
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise EndedError
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def hanging_up(request: Request) -> None:
    """Return when the client of a request, whose body was read, disconnects."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


class Deadline:
    """Deadline of a request, after which its samples end as they are. Made on the event loop."""

    def __init__(self, max_s: float) -> None:
        self._max_s = max_s
        self._passed = asyncio.Event()
        self._calls: list[Callable[[], None]] = []
        self._is_of_server = False
        self._alarm = asyncio.get_running_loop().call_later(max_s, self._pass)

    @property
    def is_past(self) -> bool:
        return self._passed.is_set()

    def end(self) -> None:
        """Pass immediately: the server shuts down."""
        self._is_of_server = self._is_of_server or not self.is_past
        self._pass()

    def close(self) -> None:
        self._alarm.cancel()

    def when_past(self, call: Callable[[], None]) -> None:
        self._calls.append(call)

    def problem(self) -> ProblemError:
        """The error for a request without any output."""
        if self._is_of_server:
            return busy("the server is shutting down; use another one, or retry later")
        return ProblemError(
            503,
            f"the request took longer than its limit of {self._max_s:g} s; ask "
            "for less, or retry when fewer requests are running",
            "timeout",
            # OpenAI's clients would retry the same work twice.
            {"Retry-After": "30", "x-should-retry": "false"},
        )

    async def within(self, work: Awaitable[_Result]) -> _Result:
        """The result of some work. Raises ProblemError, and cancels the work, when it is late."""
        try:
            return await unless(self._passed.wait(), work)
        except EndedError:
            raise self.problem() from None

    def _pass(self) -> None:
        self._alarm.cancel()
        self._passed.set()
        for call in self._calls:
            call()
