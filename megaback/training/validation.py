"""Validation: loss on the whole val set in nats per token and bits per byte, also by context."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_pipeline.loading.row_parts import PartialBatch
from data_pipeline.loading.rows import IGNORED_TARGET, Batch
from megaback.distributed.world import World, attempt
from megaback.model.attention import Segments, padded_boundaries
from megaback.model.compiler import compile_for_any_length
from megaback.model.sending import Arriving, sent
from megaback.tracking.loss_by_context import ContextLoss, bucket_of, num_buckets
from megaback.training.device_batches import DeviceBatches


def to_device(
    batch: Batch,
    device: torch.device,
    context_tokens: int | None = None,
    *,
    is_compiled: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Segments]:
    """Arguments of the model's forward pass, on its device.

    With `context_tokens`, the length of a row, the shapes and numbers in them are the same for
    almost every batch of as many rows, and with `is_compiled` the same code serves all of them.
    Segments of a part of each row are those of the whole rows.
    """
    lengths = tuple(np.diff(batch.cu_seqlens).tolist())
    boundaries = batch.cu_seqlens
    if context_tokens is not None:
        boundaries = padded_boundaries(boundaries)
    ids_T, targets_T, cu_seqlens = (
        sent(torch.from_numpy(array), device)
        for array in (batch.ids_T, batch.targets_T, boundaries)
    )
    if is_compiled:
        compile_for_any_length(cu_seqlens)
    # Positions are computed on the device, which is faster than sending them.
    num_tokens = int(batch.cu_seqlens[-1])
    starts_T = cu_seqlens[:-1].repeat_interleave(cu_seqlens.diff(), output_size=num_tokens)
    positions_T = torch.arange(num_tokens, device=device) - starts_T
    max_tokens = context_tokens or max(lengths)
    segments = Segments(cu_seqlens, lengths, max_tokens)
    if isinstance(batch, PartialBatch):
        positions_T = batch.part.of(positions_T, batch.num_rows)
        segments = replace(segments, divided_rows=batch.num_rows)
    return ids_T, targets_T, positions_T, segments


def agreed_batches(batches: Iterable[Batch], world: World) -> Iterator[Batch]:
    """Yield batches, the same number on every rank; an error on any rank ends all ranks.

    A batch is read, and the number of errors is under way, while the one before it is used.
    """
    iterator = iter(batches)
    batch, error = attempt(next, iterator, None)
    num_errors = world.begin_sum(error is not None)
    while True:
        if num_errors.result()[0]:
            world.stop_if_any(error)
        if batch is None:
            return
        used = batch
        batch, error = attempt(next, iterator, None)
        num_errors = world.begin_sum(error is not None)
        yield used


def _with_following(batches: Iterator[Batch]) -> Iterator[tuple[Batch, list[Batch]]]:
    """Each batch, with the one after it if there is one."""
    batch = next(batches, None)
    while batch is not None:
        following = next(batches, None)
        yield batch, [] if following is None else [following]
        batch = following


@torch.no_grad()
def evaluate(
    engine: Any,
    batches: Iterable[Batch],
    context_tokens: int,
    piece_num_bytes: npt.NDArray[np.int64],
    world: World,
    on_batch: Callable[[], None],
    *,
    is_both: bool = False,
    is_compiled: bool = False,
) -> ContextLoss:
    """Loss on a val set that is distributed over all ranks, with the same result on every rank.

    `is_both`: the batches are of a model of both directions, whose losses are also given apart.
    `context_tokens`: length of a row. `on_batch` is called before each batch. `is_compiled`: the
    model is compiled for training; this runs it uncompiled, as compiling again takes minutes.
    """
    engine.eval()
    sums_D3B = np.zeros((2 if is_both else 1, 3, num_buckets(context_tokens)))

    def add(batch: Batch, nats: Arriving) -> None:
        nats_T = nats.result().double().numpy()
        is_target_T = batch.targets_T != IGNORED_TARGET
        context_T = batch.positions_T + 1
        is_forward_T = np.zeros_like(is_target_T)
        if batch.is_forward_N is not None:
            is_forward_T = batch.is_forward_N.repeat(len(is_target_T) // len(batch.is_forward_N))
        for sums_3B, in_direction_T in zip(sums_D3B, (~is_forward_T, is_forward_T), strict=False):
            chosen_T = is_target_T & in_direction_T
            bucket_N = bucket_of(context_T[chosen_T])
            bytes_N = piece_num_bytes[batch.targets_T[chosen_T]]
            for sums_B, of_each_N in zip(sums_3B, (nats_T[chosen_T], None, bytes_N), strict=True):
                sums_B += np.bincount(bucket_N, of_each_N, len(sums_B))

    sending = DeviceBatches(
        world.device, partial(to_device, device=world.device, context_tokens=context_tokens)
    )
    before: tuple[Batch, Arriving] | None = None
    on_batch()
    for batch, following in _with_following(agreed_batches(batches, world)):
        on_batch()
        for _, inputs in sending.take([batch], following):
            with torch.compiler.set_stance("force_eager") if is_compiled else nullcontext():
                nats = Arriving(engine(*inputs))
        if before is not None:  # while this batch computes and the next one is copied
            add(*before)
        before = batch, nats
    if before is not None:
        add(*before)
    engine.train()
    return ContextLoss.of_sums(np.array(world.sum(*sums_D3B.ravel())).reshape(sums_D3B.shape))
