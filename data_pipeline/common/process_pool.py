"""Work shared by processes that end with whoever started them."""

import os
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import active_children, get_context, parent_process
from multiprocessing.connection import wait
from multiprocessing.process import BaseProcess
from threading import Thread
from typing import Any, TypeVar

from data_pipeline.common.console import only_comments, protect_console
from data_pipeline.common.import_path import safe_child_imports
from data_pipeline.common.interrupts import begin_child, received_signal, signals_deferred
from data_pipeline.common.logging_setup import set_up_logging
from data_pipeline.errors import ConfigError, LaunchError

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
    iterating leaves the calls undone that have not begun. An interrupt ends all processes; none
    runs any more when it is raised.
    """
    if not calls:
        return
    silence_resource_tracker()
    others = set(active_children())
    # Spawned, not forked: a fork copies the locks of whatever threads a library has started.
    with safe_child_imports():
        pool = ProcessPoolExecutor(
            min(workers, len(calls)),
            mp_context=get_context("spawn"),
            initializer=_begin,
            initargs=(shared,),
        )
    is_interrupted = False
    try:
        with safe_child_imports():
            running = {_submit(pool, function, call): number for number, call in enumerate(calls)}
        for future in as_completed(running):
            yield running[future], future.result()
    except BrokenProcessPool:
        raise LaunchError(
            "a worker was killed from outside (out of memory, perhaps); "
            "run the same command again, with fewer `workers`, to go on"
        ) from None
    except GeneratorExit:
        is_interrupted = received_signal() is not None
        raise
    except (KeyboardInterrupt, SystemExit):
        is_interrupted = True
        raise
    finally:
        try:
            if not is_interrupted:
                pool.shutdown(cancel_futures=True)  # waits for the calls that run
        finally:
            # What an interrupt leaves, and what a pool forgets that breaks while it starts.
            kill(set(active_children()) - others)
            pool.shutdown(wait=False, cancel_futures=True)


def silence_resource_tracker() -> None:
    """Have the standard library's tracker of semaphores tidy up after workers without warnings."""
    option = "ignore:resource_tracker:UserWarning"
    if option not in sys.warnoptions:
        sys.warnoptions.append(option)  # the tracker is started with the options of this process


def kill(processes: Iterable[BaseProcess]) -> None:
    """Kill processes, and wait until they are gone."""
    processes = list(processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _submit(
    pool: ProcessPoolExecutor, function: Callable[..., _Result], call: tuple[Any, ...]
) -> "Future[_Result]":
    try:
        with signals_deferred():  # a worker is started here, if there are not enough
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
    begin_worker()


def begin_worker() -> None:
    """In a process that works for another one: end with that one, and by it alone."""
    begin_child()
    protect_console()
    only_comments()
    with suppress(ConfigError):  # the process that starts workers has said it
        set_up_logging()
    end_with_parent()


def end_with_parent() -> None:
    """End this process when the one that started it is gone: it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
