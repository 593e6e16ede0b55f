"""Threads that wait for a server, and do not keep a program from ending."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

_Result = TypeVar("_Result")


class DaemonPool:
    """A few threads that call functions in the order of submission.

    Unlike those of a ThreadPoolExecutor they are daemons: after Ctrl-C nothing waits for a server
    that does not answer.
    """

    def __init__(self, num_threads: int) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[..., Any], tuple[Any, ...]] | None]
        self._calls = SimpleQueue()
        self._num_threads = num_threads
        for _ in range(num_threads):
            threading.Thread(target=self._work, daemon=True).start()

    def submit(self, function: Callable[..., _Result], *arguments: Any) -> "Future[_Result]":
        """Call a function in a thread."""
        future: Future[_Result] = Future()
        self._calls.put((future, function, arguments))
        return future

    def close(self) -> None:
        """Cancel what has not begun. What has is not waited for."""
        with suppress(Empty):
            while True:
                if (call := self._calls.get_nowait()) is not None:
                    call[0].cancel()
        for _ in range(self._num_threads):
            self._calls.put(None)

    def _work(self) -> None:
        while (call := self._calls.get()) is not None:
            future, function, arguments = call
            if not future.set_running_or_notify_cancel():
                continue
            try:
                result = function(*arguments)
            except BaseException as error:  # noqa: BLE001 - raised where the result is asked for
                future.set_exception(error)
            else:
                future.set_result(result)
