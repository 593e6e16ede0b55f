"""One model on several devices: a process per device computes log-probabilities.

With a single device, the calling process computes them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from itertools import cycle
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch

from data_pipeline.common.import_path import safe_child_imports
from data_pipeline.common.interrupts import received_signal, signals_deferred
from data_pipeline.common.process_pool import begin_worker, kill, silence_resource_tracker
from data_pipeline.errors import LaunchError
from megaback.inference.likelihood import (
    Continuation,
    begun_log_probabilities,
    log_probabilities,
)
from megaback.inference.placement import choose_device
from megaback.model.gpt import ReverseGPT
from megaback.weights.model_folder import load_model_folder

_BATCHES_AHEAD = 2
"""Batches that a device of this process has been given before the first of them is waited for."""
_KILLED = (
    "a device's process was killed, perhaps for lack of memory; run the same command again, with "
    "fewer devices in `device`"
)


def choose_devices(names: str | None) -> list[torch.device]:
    """Devices by name, separated by commas; by default every GPU, or else the CPU.

    Raises BackendError if one of them is not available.
    """
    if names is not None:
        return [choose_device(name.strip()) for name in names.split(",")]
    count = torch.cuda.device_count()
    return [torch.device("cuda", number) for number in range(count)] or [torch.device("cpu")]


class DevicePool:
    """The model of a folder, on each of several devices. Close it, or use it with `with`."""

    def __init__(
        self,
        folder: Path,
        devices: Sequence[torch.device],
        dtype: torch.dtype,
        model: ReverseGPT | None = None,
    ) -> None:
        """`model`: the same model, if it is loaded already; used if there is one device."""
        self._folder, self.dtype = folder, dtype
        self._devices = [str(device) for device in devices]
        self._model = model
        self._begun: deque[tuple[Future[list[float]], Callable[[], list[float]]]] = deque()
        self._pools = []
        self._processes: set[BaseProcess] = set()
        if len(devices) > 1:
            silence_resource_tracker()
            with safe_child_imports():  # the tracker of semaphores is a process, too
                self._pools = [
                    ProcessPoolExecutor(1, get_context("spawn"), initializer=begin_worker)
                    for _ in devices
                ]
        self._next_devices = cycle(range(len(devices)))

    def submit(self, continuations: Sequence[Continuation]) -> "Future[list[float]]":
        """Start computing log P(written | given) of each, on the next device.

        Raises LaunchError if its process was killed.
        """
        number = next(self._next_devices)
        if self._pools:
            call = (str(self._folder), self._devices[number], self.dtype, continuations)
            others = set(active_children())
            try:
                with (
                    safe_child_imports(),
                    signals_deferred(),
                ):  # the first call starts a process
                    running = self._pools[number].submit(_on_device, *call)
                    self._processes |= set(active_children()) - others
                return running
            except BrokenProcessPool:
                raise LaunchError(_KILLED) from None
        if self._model is None:
            self._model, _, _ = load_model_folder(
                self._folder, torch.device(self._devices[0]), self.dtype
            )
        begun: Future[list[float]] = Future()
        self._begun.append((begun, begun_log_probabilities(self._model, continuations)))
        if len(self._begun) > _BATCHES_AHEAD:
            self._finish_first()
        return begun

    def _finish_first(self) -> None:
        begun, finish = self._begun.popleft()
        begun.set_result(finish())

    def result(self, future: "Future[list[float]]") -> list[float]:
        """The log-probabilities, once computed. Raises LaunchError if the process was killed."""
        while self._begun and not future.done():
            self._finish_first()
        try:
            return future.result()
        except BrokenProcessPool:
            raise LaunchError(_KILLED) from None

    def close(self) -> None:
        """Wait for running work, or kill it if this process has received a signal to end."""
        is_interrupted = received_signal() is not None
        if is_interrupted:
            kill(self._processes)
        for pool in self._pools:
            pool.shutdown(wait=not is_interrupted, cancel_futures=True)

    def __enter__(self) -> "DevicePool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@lru_cache(maxsize=1)
def _loaded(folder: str, device: str, dtype: torch.dtype) -> ReverseGPT:
    model, _, _ = load_model_folder(Path(folder), torch.device(device), dtype)
    return model


def _on_device(
    folder: str, device: str, dtype: torch.dtype, continuations: Sequence[Continuation]
) -> list[float]:
    return log_probabilities(_loaded(folder, device, dtype), continuations)
