"""One model on several devices: a process per device computes log-probabilities.

With a single device, the calling process computes them.
"""

from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache, partial
from itertools import cycle
from multiprocessing import active_children, get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch

from data_pipeline.common.import_path import safe_child_imports
from data_pipeline.common.interrupts import received_signal, signals_deferred
from data_pipeline.common.process_pool import begin_worker, kill, silence_resource_tracker
from data_pipeline.errors import LaunchError
from megaback.inference.likelihood import (
    Continuation,
    Likelihood,
    begun_likelihoods,
    begun_log_probabilities,
)
from megaback.inference.placement import choose_device, dtype_name
from megaback.model.gpt import ReverseGPT
from megaback.weights.model_folder import load_model_folder

_Result = TypeVar("_Result")
_Begin = Callable[[ReverseGPT, Sequence[Continuation]], Callable[[], list[_Result]]]
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
        self._begun: deque[tuple[Future[list[Any]], Callable[[], list[Any]]]] = deque()
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

    @property
    def dtype_name(self) -> str:
        """Data type of the weights: `float32` or `bfloat16`."""
        return dtype_name(self.dtype)

    def submit(self, continuations: Sequence[Continuation]) -> "Future[list[float]]":
        """Start computing log P(written | given) of each, on the next device.

        Raises LaunchError if its process was killed.
        """
        return self._submit(begun_log_probabilities, continuations)

    def submit_likelihoods(
        self, continuations: Sequence[Continuation]
    ) -> "Future[list[Likelihood]]":
        """`submit`, with whether each is what greedy decoding would write."""
        return self._submit(begun_likelihoods, continuations)

    def _submit(
        self, begin: _Begin[_Result], continuations: Sequence[Continuation]
    ) -> "Future[list[_Result]]":
        number = next(self._next_devices)
        if self._pools:
            call = partial(
                _on_device,
                str(self._folder),
                self._devices[number],
                self.dtype,
                begin,
                continuations,
            )
            others = set(active_children())
            try:
                with (
                    safe_child_imports(),
                    signals_deferred(),
                ):  # the first call starts a process
                    running = self._pools[number].submit(call)
                    self._processes |= set(active_children()) - others
                return running
            except BrokenProcessPool:
                raise LaunchError(_KILLED) from None
        if self._model is None:
            self._model, _, _ = load_model_folder(
                self._folder, torch.device(self._devices[0]), self.dtype
            )
        begun: Future[list[_Result]] = Future()
        self._begun.append((begun, begin(self._model, continuations)))
        if len(self._begun) > _BATCHES_AHEAD:
            self._finish_first()
        return begun

    def _finish_first(self) -> None:
        begun, finish = self._begun.popleft()
        begun.set_result(finish())

    def result(self, future: "Future[list[_Result]]") -> list[_Result]:
        """The results, once computed. Raises LaunchError if the process was killed."""
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
    folder: str,
    device: str,
    dtype: torch.dtype,
    begin: _Begin[_Result],
    continuations: Sequence[Continuation],
) -> list[_Result]:
    return begin(_loaded(folder, device, dtype), continuations)()
