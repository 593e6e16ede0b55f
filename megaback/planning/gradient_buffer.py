"""Gradients that a rank keeps at ZeRO 1 and 2. Loads no torch.

ZeRO cuts each group of parameters, joined, into equal slices, and keeps whole gradients of all
parameters that reach into a rank's slice.
"""

from functools import cache
from math import ceil

import numpy as np

from megaback.config import ModelSection
from megaback.config_finetune import LoraSection
from megaback.planning.adapters import adapter_shapes
from megaback.planning.flops import ModelSize
from megaback.planning.matrix_shares import matrices_of


def kept_elements(
    shape: ModelSection,
    vocab_size: int,
    optimizer: str,
    ranks: int,
    rank: int | None,
    lora: LoraSection | None = None,
) -> int:
    """Elements of the gradients that a rank keeps, by default of the one that keeps most."""
    if lora is not None:
        factors = tuple(rows * columns for rows, columns in adapter_shapes(shape, lora).values())
        kept = _kept((factors,), ranks)
        return int(kept.max() if rank is None else kept[rank])
    size = ModelSize.of(shape, vocab_size)
    matrices = tuple(rows * columns for rows, columns in matrices_of(shape))
    outer = (size.embedding, *((size.head,) if size.head else ()))
    joined = (size.embedding, *matrices, *outer[1:])
    groups = (outer, matrices) if optimizer == "muon" else (joined,)
    kept = _kept((*groups, (size.norms,)), ranks)
    return int(kept.max() if rank is None else kept[rank])


@cache
def _kept(
    groups: tuple[tuple[int, ...], ...], ranks: int
) -> "np.ndarray[tuple[int], np.dtype[np.int64]]":
    """Elements that each rank keeps of groups of parameters, given by their lengths."""
    kept = np.zeros(ranks, dtype=np.int64)
    for lengths in groups:
        ends = np.cumsum(lengths)
        starts = np.arange(ranks) * ceil(ends[-1] / ranks)
        stops = np.minimum(starts + ceil(ends[-1] / ranks), ends[-1])
        first = np.searchsorted(ends, starts, side="right")
        last = np.searchsorted(ends, stops, side="left")
        sums = np.concatenate([[0], ends])
        kept += np.where(
            starts < stops,
            sums[np.minimum(last + 1, len(lengths))] - sums[np.minimum(first, len(lengths))],
            0,
        )
    return kept
