"""Causal attention within packed documents: the segments, and a backend for every device.

A backend takes packed queries, keys and values of one dtype, and their segments; no token attends
beyond its own segment. `sdpa`, PyTorch's attention, is the one for any device; kernels for packed
tokens are in `flash_attention`, and `attention_choice` selects.

Shapes: T packed tokens, P tokens with padding, H query heads, K key and value heads, E head
dimension.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from megaback.model.sending import sent


@dataclass(frozen=True)
class SegmentGroups:
    """Segments of one padded length each, for one call per group."""

    shapes: tuple[tuple[int, int], ...]
    """(number of segments, padded length) of each group."""
    source_P: Tensor | None
    """Index of the packed token at each place of the groups; None: they are in packed order."""
    place_T: Tensor | None
    """Place of each packed token."""


@dataclass(frozen=True)
class Segments:
    """Segments of packed tokens.

    cu_seqlens is int32, of shape (segments + 1,), from 0 to T. Segments at its end may be empty.
    """

    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    """Lengths of all segments that are not empty."""
    max_tokens: int
    """Upper bound of the lengths, in tokens."""
    divided_rows: int | None = None
    """Number of rows of which the tokens at hand are a part, and these the segments of the whole;
    None: the tokens are whole."""

    @classmethod
    def from_lengths(cls, lengths: tuple[int, ...], device: torch.device) -> "Segments":
        edges = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(sent(edges, device), lengths, max(lengths))

    @cached_property
    def groups(self) -> SegmentGroups:
        """Groups for attention on this device: of equal lengths on a CPU, of similar ones on a GPU.

        A CPU saves little by fewer calls, and computes the padding.
        """
        device = self.cu_seqlens.device
        return _grouped(np.array(self.lengths), device, pads=device.type != "cpu")


AttentionBackend = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
"""(query_THE, key_TKE, value_TKE, segments) -> attended_THE"""


def padded_boundaries(cu_seqlens: npt.NDArray[np.int32]) -> npt.NDArray[np.int32]:
    """Boundaries of segments, and of empty ones up to a power of two.

    Almost all batches of a run have the same number then. It is a function of the batch alone, as
    kernels may split their sums by it.
    """
    missing = (1 << (len(cu_seqlens) - 2).bit_length()) + 1 - len(cu_seqlens)
    return np.pad(cu_seqlens, (0, missing), mode="edge")


def sdpa_attention(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments: Segments
) -> Tensor:
    """PyTorch's scaled dot product attention, one causal call per group of segments.

    Padding follows a segment, where no token of the segment attends to it.
    """
    groups = segments.groups
    inputs = [_split_groups(packed, groups) for packed in (query_THE, key_TKE, value_TKE)]
    repeats = query_THE.shape[1] // key_TKE.shape[1]
    attended = [
        _attend_group(query, key, value, shape, repeats)
        for shape, query, key, value in zip(groups.shapes, *inputs, strict=True)
    ]
    attended_PHE = torch.cat(attended)
    return attended_PHE if groups.place_T is None else attended_PHE.index_select(0, groups.place_T)


def _split_groups(packed: Tensor, groups: SegmentGroups) -> Sequence[Tensor]:
    # Split once: slicing a segment at a time makes the backward pass many times slower.
    padded = packed if groups.source_P is None else packed.index_select(0, groups.source_P)
    return torch.split(padded, [number * length for number, length in groups.shapes])


def _attend_group(
    query: Tensor, key: Tensor, value: Tensor, shape: tuple[int, int], repeats: int
) -> Tensor:
    """Attention within each of `number` segments of one length, from and to packed order."""
    if repeats > 1:
        key, value = (heads.repeat_interleave(repeats, dim=1) for heads in (key, value))
    query, key, value = (
        heads.reshape(*shape, *heads.shape[1:]).transpose(1, 2) for heads in (query, key, value)
    )
    attended = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    return attended.transpose(1, 2).flatten(0, 1)


def _grouped(lengths: npt.NDArray[np.int64], device: torch.device, *, pads: bool) -> SegmentGroups:
    padded = _padded_lengths(lengths) if pads else lengths
    sizes, numbers = np.unique(padded, return_counts=True)
    shapes = tuple(zip(numbers.tolist(), sizes.tolist(), strict=True))
    if len(shapes) == 1 and (padded == lengths).all():
        return SegmentGroups(shapes, None, None)
    order = np.argsort(padded, kind="stable")
    starts = (lengths.cumsum() - lengths)[order]
    lengths, padded = lengths[order], padded[order]
    inside = np.arange(padded.sum()) - (padded.cumsum() - padded).repeat(padded)
    last = (lengths - 1).repeat(padded)
    source = starts.repeat(padded) + np.minimum(inside, last)
    place = np.empty(lengths.sum(), dtype=np.int64)
    is_token = inside <= last
    place[source[is_token]] = np.flatnonzero(is_token)
    return SegmentGroups(
        shapes, sent(torch.from_numpy(source), device), sent(torch.from_numpy(place), device)
    )


_MIN_PADDING_STEP = 16
_STEPS_PER_DOUBLING = 8


def _padded_lengths(lengths: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Lengths rounded up to a few distinct ones, at most a fifth longer from 128 tokens on."""
    doublings = 2 ** np.ceil(np.log2(lengths)).astype(np.int64)
    steps = np.maximum(doublings // _STEPS_PER_DOUBLING, _MIN_PADDING_STEP)
    return -(-lengths // steps) * steps
