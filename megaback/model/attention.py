"""Causal attention within packed documents, with a flash-attn and an SDPA backend.

A backend takes packed queries, keys and values, and their segments; no token attends beyond its own
segment. `flash_attn` is the varlen kernel on CUDA; `sdpa` is PyTorch's attention on any device, one
call per segment. A backend that is requested by name and unavailable is an error.

Shapes: T packed tokens, H query heads, K key and value heads, E head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor

from data_pipeline.errors import BackendError


@dataclass(frozen=True)
class Segments:
    """Segments of packed tokens: cu_seqlens is int32, shape (segments + 1,), from 0 to T."""

    cu_seqlens: Tensor
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: tuple[int, ...], device: torch.device) -> "Segments":
        edges = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return cls(edges.to(device), lengths)

    @cached_property
    def longest(self) -> int:
        return max(self.lengths)


AttentionBackend = Callable[[Tensor, Tensor, Tensor, Segments], Tensor]
"""(query_THE, key_TKE, value_TKE, segments) -> attended_THE"""


def sdpa_attention(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments: Segments
) -> Tensor:
    """PyTorch's scaled dot product attention, one causal call per segment."""
    lengths = list(segments.lengths)
    groups = query_THE.shape[1] // key_TKE.shape[1]
    if groups > 1:
        key_TKE = key_TKE.repeat_interleave(groups, dim=1)
        value_TKE = value_TKE.repeat_interleave(groups, dim=1)
    # Split once along the packed dimension: slicing a segment at a time makes the backward pass
    # many times slower.
    parts = zip(
        torch.split(query_THE.transpose(0, 1), lengths, dim=1),
        torch.split(key_TKE.transpose(0, 1), lengths, dim=1),
        torch.split(value_TKE.transpose(0, 1), lengths, dim=1),
        strict=True,
    )
    attended = [
        F.scaled_dot_product_attention(q[None], k[None], v[None], is_causal=True)[0]
        for q, k, v in parts
    ]
    return torch.cat(attended, dim=1).transpose(0, 1)


def flash_attention(
    query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments: Segments
) -> Tensor:
    """flash-attn's varlen kernel: https://github.com/Dao-AILab/flash-attention."""
    from flash_attn import flash_attn_varlen_func

    attended: Tensor = flash_attn_varlen_func(
        query_THE,
        key_TKE,
        value_TKE,
        segments.cu_seqlens,
        segments.cu_seqlens,
        segments.longest,
        segments.longest,
        causal=True,
    )
    return attended


_MAX_FLASH_HEAD_DIM = 256


def attention_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int
) -> tuple[str, AttentionBackend]:
    """Name and function of the backend for a device, by name or `auto`.

    Raises BackendError when it is requested by name and cannot be used.
    """
    if name == "sdpa":
        return "sdpa", sdpa_attention
    problem = _why_no_flash_attention(device, dtype, head_dim)
    if problem is None:
        return "flash_attn", flash_attention
    if name == "flash_attn":
        raise BackendError(
            f"hardware.attention is flash_attn, but {problem}; use sdpa, or bf16 on a CUDA machine "
            "after `pip install --no-build-isolation -e '.[flash]'`"
        )
    return "sdpa", sdpa_attention


def _why_no_flash_attention(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"the device is {device.type}"
    if dtype not in (torch.float16, torch.bfloat16):
        return f"its kernels do not support {str(dtype).removeprefix('torch.')}"
    if head_dim > _MAX_FLASH_HEAD_DIM:
        return f"its heads have at most {_MAX_FLASH_HEAD_DIM} dimensions, not {head_dim}"
    try:
        import flash_attn  # noqa: F401 - an installed package may still fail to import
    except ImportError as error:
        return f"it cannot be imported ({error})"
    return None
