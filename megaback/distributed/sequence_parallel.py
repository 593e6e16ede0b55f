"""Attention over whole rows of which every rank of a group has a part (DeepSpeed-Ulysses).

Before attention an all-to-all exchanges tokens for heads: each rank gets its share of the heads for
all tokens of the rows, so that any backend computes whole packed documents. Another one brings the
results back. Jacobs et al., "DeepSpeed Ulysses" (2023); docs/decisions/0076-sequence-parallel.md
has the reasons.

Shapes: T tokens of this rank, A those of the whole rows, P ranks of the group, H query heads,
K key and value heads, G heads of a rank, E head dimension.
"""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megaback.config import Config
from megaback.distributed.world import World
from megaback.model.attention import AttentionBackend, Segments


def over_whole_rows(backend: AttentionBackend, config: Config, world: World) -> AttentionBackend:
    """The backend, over whole rows also where this rank has a part of them. Collective."""
    parts = config.batch.sequence_parallel
    if parts == 1:
        return backend
    first = world.rank // parts * parts
    group = dist.new_group(
        list(range(first, first + parts)),
        timedelta(seconds=config.hardware.collective_timeout_s),
        use_local_synchronization=True,
        group_desc="parts of rows",
    )
    return exchanging_heads(backend, group)


def exchanging_heads(backend: AttentionBackend, group: Any) -> AttentionBackend:
    """A backend for parts of rows, and for whole tokens, which are not exchanged."""
    # An operator that torch.compile traces with its gradient.
    from deepspeed.sequence.layer import register_all_to_all_group

    name, parts = register_all_to_all_group(group), dist.get_world_size(group)

    def exchanged(sent: Tensor) -> Tensor:
        received: Tensor = torch.ops.deepspeed.dim_zero_all_to_all(sent.contiguous(), name)
        return received

    def attention(
        query_THE: Tensor, key_TKE: Tensor, value_TKE: Tensor, segments: Segments
    ) -> Tensor:
        rows = segments.divided_rows
        if rows is None:
            return backend(query_THE, key_TKE, value_TKE, segments)
        (num_tokens, num_heads, head_dim), kv_heads = query_THE.shape, key_TKE.shape[1]
        if kv_heads < parts:  # copies for the ranks that share a head, whose gradients are added
            key_TKE, value_TKE = (
                heads.repeat_interleave(parts // kv_heads, dim=1) for heads in (key_TKE, value_TKE)
            )
        of_ranks = [
            heads.reshape(num_tokens, parts, -1, head_dim).transpose(0, 1)
            for heads in (query_THE, key_TKE, value_TKE)
        ]
        shares = [heads.shape[2] for heads in of_ranks]
        received_PTGE = exchanged(torch.cat(of_ranks, dim=2))
        by_row = received_PTGE.view(parts, rows, -1, sum(shares), head_dim).transpose(0, 1)
        query_AGE, key_AGE, value_AGE = torch.split(by_row.flatten(0, 2), shares, dim=1)
        attended_AGE = backend(query_AGE, key_AGE, value_AGE, segments)
        by_part = attended_AGE.view(rows, parts, -1, shares[0], head_dim).transpose(0, 1)
        results_PTGE = exchanged(by_part.flatten(1, 2))
        return results_PTGE.transpose(0, 1).reshape(num_tokens, num_heads, head_dim)

    return attention
