"""Log-probabilities of ids and of the likeliest ones in their place, fetched together.

Shapes: N positions, V vocabulary, L likeliest ids, S = 1 + 2 L numbers.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ScoredToken = tuple[float, tuple[tuple[int, float], ...]]
"""log P of an id in nats, and the likeliest ids at its position with theirs."""


def packed_scores(logits_NV: Tensor, ids_N: Tensor, num_likeliest: int) -> Tensor:
    """The numbers of each position's ScoredToken, in fp64 for one copy: shape (N, S)."""
    logs_NV = logits_NV.log_softmax(-1)
    values_NL, likeliest_NL = logs_NV.topk(num_likeliest)
    of_ids_N1 = logs_NV.gather(1, ids_N[:, None])
    return torch.cat([of_ids_N1.double(), likeliest_NL.double(), values_NL.double()], dim=1)


def scored_token(numbers: Sequence[float]) -> ScoredToken:
    """From one row of `packed_scores`."""
    of_id, *rest = numbers
    num_likeliest = len(rest) // 2
    return of_id, tuple(zip(map(int, rest[:num_likeliest]), rest[num_likeliest:], strict=True))
