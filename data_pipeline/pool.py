"""Work shared by processes that end with whoever started them."""

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from threading import Thread
from typing import Any, TypeVar

from data_pipeline.errors import LaunchError
from data_pipeline.import_path import safe_child_imports

_Result = TypeVar("_Result")
_shared: Any = None


def run_in_processes(
    function: Callable[..., _Result],
    calls: Sequence[tuple[Any, ...]],
    workers: int,
    shared: Any = None,
) -> Iterator[tuple[int, _Result]]:
    """Call a function once for each of `calls`; yields numbers and results as they come.

    `shared` is what `shared_by_all` gives in every process. Raises what the function raises, when
    the calls that run have ended, and LaunchError when a process was killed. A consumer that stops
    iterating leaves the calls undone that have not begun.
    """
    if not calls:
        return
    others = set(active_children())
    # Spawned, not forked: a fork copies the locks of whatever threads a library has started.
    with safe_child_imports():
        pool = ProcessPoolExecutor(
            min(workers, len(calls)),
            mp_context=get_context("spawn"),
            initializer=_begin,
            initargs=(shared,),
        )
    try:
        with safe_child_imports():
            running = {_submit(pool, function, call): number for number, call in enumerate(calls)}
        for future in as_completed(running):
            yield running[future], future.result()
    except BrokenProcessPool:
        raise LaunchError(
            "a worker was killed from outside (out of memory, perhaps); "
            "run the same command again, with fewer --workers, to go on"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)
        # A pool that breaks while it starts forgets processes, for which this one would wait.
        for process in set(active_children()) - others:
            process.kill()


def _submit(
    pool: ProcessPoolExecutor, function: Callable[..., _Result], call: tuple[Any, ...]
) -> "Future[_Result]":
    try:
        return pool.submit(function, *call)
    except OSError as error:
        if error.errno is not None:
            raise
        # A worker was killed while this one was started: the queue is closed that it was to have.
        raise BrokenProcessPool from error


def shared_by_all() -> Any:
    """In a worker, what `run_in_processes` was given to share; else None."""
    return _shared


def _begin(shared: Any) -> None:
    global _shared
    _shared = shared
    end_with_parent()


def end_with_parent() -> None:
    """End this process when the one that started it is gone: it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
