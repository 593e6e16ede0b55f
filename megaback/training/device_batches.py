"""Batches on the device, each copied there while the one before it computes.

A copy on the stream of the computation would begin when that is done. On a CPU nothing is copied,
and a batch is converted when it is due.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from data_pipeline.loading.rows import Batch
from megaback.model.attention import Segments

Arguments = tuple[Tensor, Tensor, Tensor, Segments]
"""Arguments of the model's forward pass: ids, targets, positions and segments."""


class DeviceBatches:
    """The batches of a run in their order, on the device."""

    def __init__(self, device: torch.device, convert: Callable[[Batch], Arguments]) -> None:
        """`convert`: function that makes a batch's arguments on the device, without waiting."""
        self._device, self._convert = device, convert
        self._stream = None if device.type == "cpu" else torch.Stream(device)
        self._sent: tuple[Batch, Arguments, torch.Event] | None = None

    def take(
        self, batches: Sequence[Batch], following: Sequence[Batch]
    ) -> Iterator[tuple[Batch, Arguments]]:
        """Each batch with its arguments. `following`: those that are due after the last one.

        A batch is copied when the caller, having queued the work on the one before, asks for it.
        """
        due = [*batches, *following[:1]]
        for number, batch in enumerate(batches, start=1):
            yield batch, self._arrived(batch) or self._convert(batch)
            self._send(due[number:])

    def _send(self, due: Sequence[Batch]) -> None:
        """Start to copy the first batch that is due, if any."""
        if self._stream is None or not due:
            return
        with self._stream:
            arguments = self._convert(due[0])
            self._sent = due[0], arguments, self._stream.record_event()

    def _arrived(self, batch: Batch) -> Arguments | None:
        """A batch's arguments, if they were sent, for use on the current stream."""
        sent, self._sent = self._sent, None
        if sent is None or sent[0] is not batch:
            return None
        _, arguments, event = sent
        stream = torch.accelerator.current_stream(self._device)
        stream.wait_event(event)
        ids_T, targets_T, positions_T, segments = arguments
        for tensor in (ids_T, targets_T, positions_T, segments.cu_seqlens):
            tensor.record_stream(stream)  # its memory is not reused before the stream is done
        return arguments
