"""Uniform numbers that rows sample with, made on the CPU and sent to the device ahead of their use.

Sent one step at a time, they would make the host wait for the device at every token.

Shapes: R rows, S steps.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from megaback.model.sending import sent

_STEPS_AHEAD = 64


class DrawStream:
    """One row's numbers in their order, which depends on its seed alone."""

    def __init__(self, seed: int) -> None:
        self._generator = np.random.default_rng(seed)
        self._ahead = np.empty(0, dtype=np.float32)

    def next(self, count: int) -> npt.NDArray[np.float32]:
        """The next numbers, which are not used up: shape (count,)."""
        missing = count - len(self._ahead)
        if missing > 0:
            more = self._generator.random(missing, dtype=np.float32)
            self._ahead = np.concatenate([self._ahead, more])
        return self._ahead[:count]

    def advance(self) -> None:
        """Use up one number."""
        self._ahead = self._ahead[1:]


class DrawTable:
    """The next numbers of the rows in use, on the device."""

    def __init__(self, num_rows: int, device: torch.device) -> None:
        self._draws_SR = torch.zeros(_STEPS_AHEAD, num_rows, dtype=torch.float64, device=device)
        self._step = 0
        self._step_1 = torch.zeros(1, dtype=torch.long, device=device)

    @property
    def current(self) -> Tensor:
        """The numbers of this step, also of unused rows: shape (R,), in fp64."""
        return self._draws_SR.index_select(0, self._step_1)[0]

    def set(self, row: int, stream: DrawStream) -> None:
        """Fill a row."""
        draws_S = torch.from_numpy(stream.next(_STEPS_AHEAD - self._step).astype(np.float64))
        self._draws_SR[self._step :, row] = draws_S.to(self._draws_SR.device)

    def restart(self) -> None:
        """Make the device's and the host's step agree; for a table without rows."""
        self._step = 0
        self._step_1.zero_()

    def move(self, row: int, to: int) -> None:
        self._draws_SR[:, to] = self._draws_SR[:, row]

    def advance_on_device(self) -> None:
        """Use up the device's numbers of this step."""
        self._step_1.add_(1)

    def advance(self, streams: Sequence[DrawStream]) -> None:
        """Use up the host's numbers of each row in use: the streams of the first rows."""
        for stream in streams:
            stream.advance()
        self._step = (self._step + 1) % _STEPS_AHEAD
        if not self._step:
            draws_SR = np.stack([stream.next(_STEPS_AHEAD) for stream in streams], axis=1)
            sent_SR = sent(torch.from_numpy(draws_SR.astype(np.float64)), self._draws_SR.device)
            self._draws_SR[:, : len(streams)] = sent_SR
            self._step_1.zero_()
