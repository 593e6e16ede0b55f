"""Output head of ReverseGPT, and its cross-entropy in chunks of tokens.

Logits are the largest tensors of a step. They are computed for a chunk of tokens at a time,
together with the gradients of the chunk's loss: nothing of the size of all logits is ever stored,
and nothing is computed twice (as in Hsu et al., "Liger Kernel", 2024). The gradient of the weight
is summed in fp32. docs/decisions/0057-chunked-loss.md has the reasons.
"""

from typing import Any

import torch
from torch import Tensor, nn

from data_pipeline.loading.rows import IGNORED_TARGET


class OutputHead(nn.Linear):
    """Logits of hidden states or, with targets, cross-entropies in chunks of tokens.

    Both are calls of the module, whose hooks gather its weight at ZeRO stage 3.
    """

    def __init__(self, width: int, vocab_size: int, loss_chunk_tokens: int) -> None:
        super().__init__(width, vocab_size, bias=False)
        self.loss_chunk_tokens = loss_chunk_tokens

    def forward(
        self, hidden_TD: Tensor, targets_T: Tensor | None = None, z_loss: float = 0.0
    ) -> Tensor:
        """Logits (T, V), or the cross-entropy of each target in nats, 0 if ignored: (T,), fp32.

        The gradient of the losses is that of their sum times any factor. It includes the gradient
        of z_loss * log(sum(exp(logits)))^2.
        """
        if targets_T is None:
            return super().forward(hidden_TD)
        nats_T: Tensor = _ChunkedLoss.apply(  # type: ignore[no-untyped-call]
            hidden_TD,
            self.weight,
            targets_T,
            z_loss,
            self.loss_chunk_tokens,
            torch.is_grad_enabled(),
        )
        return nats_T


class _ChunkedLoss(torch.autograd.Function):
    """Losses of all tokens; their gradients are computed in the forward pass.

    So the weight is needed in the forward pass only. A gradient that differs between tokens is
    refused, as the weight's is already summed over them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_TD: Tensor,
        weight_VD: Tensor,
        targets_T: Tensor,
        z_loss: float,
        chunk_tokens: int,
        has_gradient: bool,
    ) -> Tensor:
        dtype = _product_dtype(hidden_TD)
        ctx.dtypes = hidden_TD.dtype, weight_VD.dtype
        hidden_TD, low_VD = hidden_TD.to(dtype), weight_VD.to(dtype)
        nats_T = torch.empty(targets_T.shape, dtype=torch.float32, device=hidden_TD.device)
        if has_gradient:
            hidden_gradient_TD = torch.empty_like(hidden_TD)
            weight_gradient_VD = None
            if ctx.needs_input_grad[1]:
                weight_gradient_VD = torch.zeros_like(weight_VD, dtype=torch.float32)
        num_tokens = len(targets_T)
        num_chunks = max(-(-num_tokens // chunk_tokens), 1)
        for number in range(num_chunks):
            part = slice(number * num_tokens // num_chunks, (number + 1) * num_tokens // num_chunks)
            part_CD, targets_C = hidden_TD[part], targets_T[part]
            logits_CV = (part_CD @ low_VD.t()).float()
            target_C1 = targets_C.clamp(min=0)[:, None]
            logit_C1 = logits_CV.gather(1, target_C1)
            logs_CV = logits_CV.log_softmax(-1)
            del logits_CV
            log_C1 = logs_CV.gather(1, target_C1)
            is_target_C1 = (targets_C != IGNORED_TARGET)[:, None]
            nats_T[part] = torch.where(is_target_C1, -log_C1, 0.0)[:, 0]
            if not has_gradient:
                continue
            # Gradient of the logits: probabilities, minus one at the target.
            gradient_CV = logs_CV.exp_()
            if z_loss:
                gradient_CV *= 1 + 2 * z_loss * (logit_C1 - log_C1)  # log of the denominator
            gradient_CV.scatter_add_(1, target_C1, torch.full_like(log_C1, -1.0))
            gradient_CV *= is_target_C1
            low_CV = gradient_CV.to(dtype)
            hidden_gradient_TD[part] = low_CV @ low_VD
            if weight_gradient_VD is None:
                continue
            if dtype == torch.float32:
                torch.addmm(weight_gradient_VD, low_CV.t(), part_CD, out=weight_gradient_VD)
            else:
                weight_gradient_VD += low_CV.t() @ part_CD
        if has_gradient:
            ctx.save_for_backward(hidden_gradient_TD, weight_gradient_VD)
        return nats_T

    @staticmethod
    def backward(ctx: Any, gradient_T: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient_TD, weight_gradient_VD = ctx.saved_tensors
        factor = gradient_T[0]
        is_same_T = (gradient_T == factor) | (gradient_T.isnan() & factor.isnan())
        torch._assert_async(is_same_T.all(), "losses in chunks can only be summed, not weighted")
        hidden_dtype, weight_dtype = ctx.dtypes
        if weight_gradient_VD is not None:
            weight_gradient_VD = weight_gradient_VD.mul_(factor).to(weight_dtype)
        hidden_gradient_TD = (hidden_gradient_TD * factor).to(hidden_dtype)
        return hidden_gradient_TD, weight_gradient_VD, *(None,) * 4


def _product_dtype(hidden_TD: Tensor) -> torch.dtype:
    """Type in which matrices are multiplied: that of autocast, or of the hidden states."""
    kind = hidden_TD.device.type
    if torch.is_autocast_enabled(kind):
        return torch.get_autocast_dtype(kind)
    return hidden_TD.dtype
