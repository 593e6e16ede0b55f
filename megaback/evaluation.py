"""The loss over a whole val set, in nats a token and in bits a byte of text."""

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.rows import IGNORED_TARGET, Batch
from megaback.attention import Segments
from megaback.distributed import World


@dataclass(frozen=True)
class ValidationResult:
    """loss is nats a token; bits_per_byte counts the bytes of text that the targets stand for."""

    loss: float
    bits_per_byte: float
    num_targets: int


def to_device(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """The arguments of the model's forward, on its device."""
    lengths = tuple(np.diff(batch.cu_seqlens).tolist())
    ids_T, targets_T, cu_seqlens = (
        torch.from_numpy(array).to(device, non_blocking=True)
        for array in (batch.ids_T, batch.targets_T, batch.cu_seqlens)
    )
    # Counted where they are needed: to count is quicker than to send.
    starts_T = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=len(ids_T))
    positions_T = torch.arange(len(ids_T), device=device) - starts_T
    return ids_T, targets_T, positions_T, Segments(cu_seqlens, lengths)


def _agreed(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """Pass on batches, of which every rank has as many; an error on any rank ends all ranks."""
    iterator = iter(batches)
    while (batch := world.together(next, iterator, None)) is not None:
        yield batch


@torch.no_grad()
def evaluate(
    engine: Any,
    batches: Iterable[Batch],
    piece_num_bytes: npt.NDArray[np.int64],
    world: World,
    on_batch: Callable[[], None],
) -> ValidationResult:
    """Measure a val set together with all ranks; every rank gets the same result.

    `on_batch` is called before each batch.
    """
    engine.eval()
    nats, num_targets, num_bytes = 0.0, 0, 0
    on_batch()
    for batch in _agreed(batches, world):
        on_batch()
        nats += float(engine(*to_device(batch, world.device)))
        targets = batch.targets_T[batch.targets_T != IGNORED_TARGET]
        num_targets += len(targets)
        num_bytes += int(piece_num_bytes[targets].sum())
    engine.train()
    nats, all_targets, all_bytes = world.sum(nats, num_targets, num_bytes)
    return ValidationResult(
        nats / max(all_targets, 1), nats / math.log(2) / max(all_bytes, 1), int(all_targets)
    )
