"""A CPU kernel for PyTorch's `varlen_attn`, which has one for CUDA only: its definition.

It is registered below `varlen_attn`, whose own checks, autograd and tracing are used. `python -m
tests.helpers.varlen_on_cpu CONFIG …` is a rank that may train with it, compiled without Inductor.

Shapes: T packed tokens, S the same as keys, H query heads, K key and value heads, E head dimension.
"""

import math
from functools import cache
from typing import Any

import torch
from torch import Tensor

from megaback.model.attention import AttentionBackend
from megaback.model.flash_attention import VARLEN


def main() -> None:
    """Train as a rank."""
    from megaback import train
    from megaback.model import attention_choice, compiler

    varlen_on_cpu()
    attention_choice._why_unsupported = lambda *_: None  # type: ignore[assignment]
    compiler.GraphCounter.__init__.__defaults__ = ("aot_eager",)
    train.main()


@cache
def varlen_on_cpu() -> AttentionBackend:
    """The backend `varlen`, for CPUs too."""
    from torch.nn.attention import varlen

    varlen._varlen_attn.register_kernel("cpu")(_forward)
    varlen._varlen_attn_backward.register_kernel("cpu")(_backward)
    return VARLEN.load()


def _weights_HTS(query_THE: Tensor, key_SHE: Tensor, cu_seqlens: Tensor) -> Tensor:  # noqa: N802
    places_T = torch.arange(len(query_THE), dtype=cu_seqlens.dtype)
    segment_T = torch.searchsorted(cu_seqlens[1:].contiguous(), places_T, right=True)
    is_seen_TS = (segment_T[:, None] == segment_T) & (places_T[:, None] >= places_T)
    scores_HTS = torch.einsum("the,she->hts", query_THE, key_SHE) / math.sqrt(query_THE.shape[-1])
    return scores_HTS.masked_fill(~is_seen_TS, -math.inf).softmax(-1)


def _for_queries(heads_TKE: Tensor, query_THE: Tensor) -> Tensor:
    return heads_TKE.repeat_interleave(query_THE.shape[1] // heads_TKE.shape[1], dim=1)


def _check(query_THE: Tensor, cu_seqlens: Tensor, max_tokens: int, window: list[int]) -> None:
    """Refuse what the kernel for CUDA refuses, or computes otherwise."""
    assert window == [-1, 0]
    assert cu_seqlens.dtype is torch.int32
    assert int(cu_seqlens[-1]) == len(query_THE)
    assert int(cu_seqlens.diff().max()) <= max_tokens


def _forward(
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    cu_seqlens: Tensor,
    _cu_seqlens_of_keys: Tensor,
    max_tokens: int,
    _max_tokens_of_keys: int,
    _is_causal: bool,
    _scale: float | None,
    window: list[int],
    *_others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    assert query_THE.dtype == key_TKE.dtype == value_TKE.dtype
    _check(query_THE, cu_seqlens, max_tokens, window)
    key_SHE, value_SHE = (_for_queries(heads, query_THE) for heads in (key_TKE, value_TKE))
    weights_HTS = _weights_HTS(query_THE, key_SHE, cu_seqlens)
    attended_THE = torch.einsum("hts,she->the", weights_HTS, value_SHE).contiguous()
    num_tokens, num_heads, _ = query_THE.shape
    return attended_THE, torch.zeros(num_heads, num_tokens), torch.zeros(2, dtype=torch.uint64)


def _backward(
    gradient_THE: Tensor,
    query_THE: Tensor,
    key_TKE: Tensor,
    value_TKE: Tensor,
    _attended_THE: Tensor,
    _logsumexp_HT: Tensor,
    cu_seqlens: Tensor,
    *_others: Any,
) -> tuple[Tensor, Tensor, Tensor]:
    key_SHE, value_SHE = (_for_queries(heads, query_THE) for heads in (key_TKE, value_TKE))
    weights_HTS = _weights_HTS(query_THE, key_SHE, cu_seqlens)
    of_weights_HTS = torch.einsum("the,she->hts", gradient_THE, value_SHE)
    mean_HT1 = (of_weights_HTS * weights_HTS).sum(-1, keepdim=True)
    of_scores_HTS = weights_HTS * (of_weights_HTS - mean_HT1) / math.sqrt(query_THE.shape[-1])
    of_query_THE = torch.einsum("hts,she->the", of_scores_HTS, key_SHE).contiguous()
    of_key_SHE = torch.einsum("hts,the->she", of_scores_HTS, query_THE)
    of_value_SHE = torch.einsum("hts,the->she", weights_HTS, gradient_THE)
    groups = (key_TKE.shape[1], -1)
    of_key_TKE, of_value_TKE = (
        heads.unflatten(1, groups).sum(2).contiguous() for heads in (of_key_SHE, of_value_SHE)
    )
    return of_query_THE, of_key_TKE, of_value_TKE


if __name__ == "__main__":
    main()
