"""Sums over the targets of batches, from which losses per token and per byte are computed."""

from collections.abc import Iterable, Iterator

import numpy as np
import numpy.typing as npt
import torch

from data_pipeline.loading.rows import IGNORED_TARGET, Batch
from megaback.model.gpt import ReverseGPT
from megaback.training.validation import to_device


@torch.inference_mode()
def loss_sums(
    model: ReverseGPT,
    batches: Iterable[Batch],
    piece_num_bytes: npt.NDArray[np.int64],
    device: torch.device,
) -> Iterator[tuple[float, int, float]]:
    """Nats, number of targets, and their bytes of text, of each batch that has targets."""
    for batch in batches:
        targets = batch.targets_T[batch.targets_T != IGNORED_TARGET]
        if len(targets):
            nats = float(model(*to_device(batch, device)).double().sum())
            yield nats, len(targets), float(piece_num_bytes[targets].sum())
