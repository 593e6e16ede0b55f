"""Muon's update of matrices: orthogonalized momentum.

Jordan et al., "Muon: An optimizer for hidden layers in neural networks" (2024),
https://kellerjordan.github.io/posts/muon/; scaled to the RMS of AdamW's updates as in Liu et al.,
"Muon is Scalable for LLM Training" (2025). Equals torch.optim.Muon with
`adjust_lr_fn="match_rms_adamw"`, but with a choice of precision and batched over matrices.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_NEWTON_SCHULZ_STEPS = 5
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_EPSILON = 1e-7
_ADAMW_RMS = 0.2


def orthogonalized(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Each matrix with its singular values near 1, scaled to the RMS of AdamW's updates.

    Matrices of one shape are processed together.
    """
    by_shape: dict[tuple[int, int], list[int]] = {}
    for index, matrix in enumerate(matrices):
        rows, columns = matrix.shape
        by_shape.setdefault((min(rows, columns), max(rows, columns)), []).append(index)
    results: list[Tensor] = list(matrices)
    for shape, indices in by_shape.items():
        flat = [matrices[i] if matrices[i].shape == shape else matrices[i].T for i in indices]
        scale = _ADAMW_RMS * math.sqrt(shape[1])
        for index, result_MN in zip(indices, newton_schulz(torch.stack(flat)), strict=True):
            scaled_MN = result_MN * scale
            results[index] = scaled_MN if matrices[index].shape == shape else scaled_MN.T
    return results


def newton_schulz(matrices_LMN: Tensor) -> Tensor:
    """L wide matrices (M <= N) with their singular values moved to between 0.7 and 1.2."""
    a, b, c = _COEFFICIENTS
    norm_L11 = matrices_LMN.float().norm(dim=(1, 2), keepdim=True).clamp(min=_EPSILON)
    x_LMN: Tensor = matrices_LMN / norm_L11.to(matrices_LMN.dtype)
    for _ in range(_NEWTON_SCHULZ_STEPS):
        gram_LMM = x_LMN @ x_LMN.mT
        polynomial_LMM = torch.baddbmm(gram_LMM, gram_LMM, gram_LMM, beta=b, alpha=c)
        x_LMN = torch.baddbmm(x_LMN, polynomial_LMM, x_LMN, beta=a)
    return x_LMN
