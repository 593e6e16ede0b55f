"""The loss on whole logits, by PyTorch's own cross-entropy."""

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from data_pipeline.loading.rows import IGNORED_TARGET


def whole_loss(
    hidden_TD: Tensor, weight_VD: Tensor, targets_T: Tensor, z_loss: float = 0.0
) -> Tensor:
    """Cross-entropies in nats; their gradient includes that of the z-loss, their value does not."""
    logits_TV = F.linear(hidden_TD, weight_VD).float()
    nats_T = F.cross_entropy(logits_TV, targets_T, ignore_index=IGNORED_TARGET, reduction="none")
    penalty_T = z_loss * logits_TV.logsumexp(-1).square() * (targets_T != IGNORED_TARGET)
    return nats_T + (penalty_T - penalty_T.detach())
