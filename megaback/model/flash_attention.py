"""Kernels of FlashAttention for packed tokens, on CUDA: `varlen`, `flash_attn`, `flash_attn_4`.

`varlen` is PyTorch's own, which torch.compile traces. The others are packages, each looked for by
its function: the one of flash-attn-4 leaves a `flash_attn` without contents behind.

Where PyTorch's deterministic algorithms are on, so are those of the kernels.
"""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from megaback.model.attention import AttentionBackend, Segments


@dataclass(frozen=True)
class FlashKernel:
    """A function for packed tokens, and what it needs."""

    name: str
    """Value of `hardware.attention`."""
    module: str
    function: str
    wrap: Callable[[Callable[..., Any], frozenset[str]], AttentionBackend]
    """Backend, from the function and the names of its parameters."""
    parameters: frozenset[str]
    """Names of parameters that the function must have."""
    min_capability: tuple[int, int]
    """Minimum compute capability of a device."""
    is_traceable: bool
    """Whether torch.compile traces it, as part of one graph."""
    install: str
    """Command or change that makes it available."""

    def load(self) -> AttentionBackend:
        """The backend. Raises ImportError if the function, or a parameter, is not there."""
        found = getattr(importlib.import_module(self.module), self.function, None)
        if found is None:
            raise ImportError(f"{self.module} has no {self.function}")
        names = frozenset(inspect.signature(found).parameters)
        missing = sorted(self.parameters - names)
        if missing:
            raise ImportError(f"its {self.function} has no parameter {missing[0]}")
        return self.wrap(found, names)


def _varlen(function: Callable[..., Any], names: frozenset[str]) -> AttentionBackend:
    grouped = {"enable_gqa": True} if "enable_gqa" in names else {}

    def varlen_attention(
        query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments: Segments
    ) -> Tensor:
        """PyTorch's attention over packed tokens; a window of (-1, 0) is causal."""
        edges, longest = segments.cu_seqlens, segments.max_tokens
        attended_THE: Tensor = function(
            query_THE,
            key_TKE,
            value_TKE,
            edges,
            edges,
            longest,
            longest,
            window_size=(-1, 0),
            **grouped,
        )
        return attended_THE

    return varlen_attention


def _flash_attn(function: Callable[..., Any], _names: frozenset[str]) -> AttentionBackend:
    def flash_attention(
        query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments: Segments
    ) -> Tensor:
        """flash-attn's function, version 2 or 4: https://github.com/Dao-AILab/flash-attention."""
        attended: Tensor | tuple[Tensor, ...] = function(
            query_THE,
            key_TKE,
            value_TKE,
            cu_seqlens_q=segments.cu_seqlens,
            cu_seqlens_k=segments.cu_seqlens,
            max_seqlen_q=segments.max_tokens,
            max_seqlen_k=segments.max_tokens,
            causal=True,
            deterministic=torch.are_deterministic_algorithms_enabled(),
        )
        # Version 4 also returns the logarithms of the sums.
        return attended[0] if isinstance(attended, tuple) else attended

    return flash_attention


_FLASH_ATTN_PARAMETERS = frozenset(
    ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "causal", "deterministic")
)
VARLEN = FlashKernel(
    name="varlen",
    module="torch.nn.attention.varlen",
    function="varlen_attn",
    wrap=_varlen,
    parameters=frozenset(("window_size",)),
    min_capability=(8, 0),
    is_traceable=True,
    install="pip install 'torch>=2.11'",
)
FLASH_ATTN = FlashKernel(
    name="flash_attn",
    module="flash_attn",
    function="flash_attn_varlen_func",
    wrap=_flash_attn,
    parameters=_FLASH_ATTN_PARAMETERS,
    min_capability=(8, 0),
    is_traceable=False,
    install="pip install --no-build-isolation -e '.[flash]'",
)
FLASH_ATTN_4 = FlashKernel(
    name="flash_attn_4",
    module="flash_attn.cute.interface",
    function="flash_attn_varlen_func",
    wrap=_flash_attn,
    parameters=_FLASH_ATTN_PARAMETERS,
    min_capability=(9, 0),
    is_traceable=False,
    install="pip install --pre flash-attn-4",
)
KERNELS = (FLASH_ATTN_4, VARLEN, FLASH_ATTN)
"""All kernels, in the order in which `auto` tries them."""
