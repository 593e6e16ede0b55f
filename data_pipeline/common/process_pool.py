"""Process pool whose workers exit with their parent process."""

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
    """Call a function with each of `calls`; yields indices and results in order of completion.

    `shared_by_all` returns `shared` in every process. Raises errors of the function, after the
    running calls have ended, and LaunchError when a process was killed. If the consumer stops
    iterating, pending calls are canceled. An interrupt ends all processes before it is raised.
    """
    if not calls:
        return
    silence_resource_tracker()
    others = set(active_children())
    # Spawned, not forked: a fork copies locks held by threads of libraries.
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
            "a worker process was killed (out of memory, perhaps); "
            "run the same command again, with fewer `workers`, to resume"
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
                pool.shutdown(cancel_futures=True)  # waits for running calls
        finally:
            # Workers left by an interrupt, and by a pool that broke during its start.
            kill(set(active_children()) - others)
            pool.shutdown(wait=False, cancel_futures=True)


def silence_resource_tracker() -> None:
    """Silence warnings of the standard library's resource tracker as it cleans up after workers."""
    option = "ignore:resource_tracker:UserWarning"
    if option not in sys.warnoptions:
        sys.warnoptions.append(option)  # the tracker inherits the options of this process


def kill(processes: Iterable[BaseProcess]) -> None:
    """Kill processes and wait for them."""
    processes = list(processes)
    for process in processes:
        process.kill()
    for process in processes:
        process.join()


def _submit(
    pool: ProcessPoolExecutor, function: Callable[..., _Result], call: tuple[Any, ...]
) -> "Future[_Result]":
    try:
        with signals_deferred():  # may start a worker
            return pool.submit(function, *call)
    except OSError as error:
        if error.errno is not None:
            raise
        # Another worker was killed meanwhile, and the queue is closed.
        raise BrokenProcessPool from error


def shared_by_all() -> Any:
    """The `shared` value of `run_in_processes` in a worker; else None."""
    return _shared


def _begin(shared: Any) -> None:
    global _shared
    _shared = shared
    begin_worker()


def begin_worker() -> None:
    """Set up a worker process, which exits with its parent and ignores Ctrl-C."""
    begin_child()
    protect_console()
    only_comments()
    with suppress(ConfigError):  # reported by the parent process
        set_up_logging()
    end_with_parent()


def end_with_parent() -> None:
    """Exit when the parent process dies, instead of waiting for work forever."""
    parent = parent_process()
    if parent is not None:
        Thread(target=_wait_and_exit, args=(parent.sentinel,), daemon=True).start()


def _wait_and_exit(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)
