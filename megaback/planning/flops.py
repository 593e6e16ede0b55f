"""Parameter counts, and FLOPs per token of a training step. Loads no torch.

Chowdhery et al., "PaLM" (2022), appendix B: 6 per weight that multiplies a token (2 forward, 4
backward), and 12 per dimension of every head and layer and per attended token. These are model
FLOPs, without recomputation (activation checkpointing) and without anything but matrix products.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from megaback.config import ModelSection
from megaback.config_finetune import LoraSection
from megaback.planning.adapters import num_trained

_NEWTON_SCHULZ_STEPS = 5


@dataclass(frozen=True)
class ModelSize:
    """Parameter counts of `model.ReverseGPT` by use."""

    embedding: int
    """One row per piece; tied embeddings, which are the head's weights too, are counted here."""
    head: int
    """lm_head; 0 where it is tied to the embeddings."""
    matrices: int
    """The matrices of all blocks, which Muon updates."""
    norms: int
    adapters: int = 0
    """LoRA's factors, of which alone there are gradients and optimizer state."""

    @property
    def total(self) -> int:
        return self.embedding + self.head + self.matrices + self.norms + self.adapters

    @property
    def trained(self) -> int:
        """Parameters with gradients and optimizer state."""
        return self.adapters or self.total

    @property
    def head_gradient(self) -> int:
        """Elements of the gradient of the head's weight."""
        return 0 if self.adapters else self.head or self.embedding

    @classmethod
    def of(
        cls, shape: ModelSection, vocab_size: int, lora: LoraSection | None = None
    ) -> "ModelSize":
        width = shape.width
        attention = 2 * width * shape.query_width + 2 * width * shape.kv_width
        mlp = 3 * width * shape.hidden_mlp_width
        norms_per_block = 2 * width + (2 * shape.head_size if shape.qk_norm else 0)
        return cls(
            embedding=vocab_size * width,
            head=0 if shape.tie_embeddings else vocab_size * width,
            matrices=shape.num_layers * (attention + mlp),
            norms=shape.num_layers * norms_per_block + width,
            adapters=0 if lora is None else num_trained(shape, lora),
        )


def flops_per_token(
    shape: ModelSection,
    vocab_size: int,
    attended_tokens: float,
    lora: LoraSection | None = None,
) -> float:
    """FLOPs of a training step per token, with a mean of `attended_tokens` attended tokens.

    Frozen weights have no gradients of their own: 4 per weight, with 6 per weight of LoRA's.
    """
    size = ModelSize.of(shape, vocab_size, lora)
    multiplying = size.matrices + vocab_size * shape.width
    attention = 12 * shape.num_layers * shape.query_width * attended_tokens
    return (4.0 if lora else 6.0) * multiplying + 6.0 * size.adapters + attention


def orthogonalization_flops(matrices: Iterable[tuple[int, int]]) -> float:
    """FLOPs of Muon's orthogonalization of matrices, of (rows, columns)."""
    total = 0.0
    for rows, columns in matrices:
        low, high = min(rows, columns), max(rows, columns)
        total += _NEWTON_SCHULZ_STEPS * (4 * low * low * high + 2 * low**3)
    return total


def attended_tokens(document_tokens: float, context_tokens: int) -> float:
    """Mean number of tokens that a token attends to, itself included, over a document and rows.

    Documents are packed, attention is causal and restarts at each document and row, and a row
    boundary is equally likely at any token of a document. An infinite document gives
    (context_tokens + 1) / 2.
    """
    near = min(document_tokens, context_tokens)
    # The p-th token of a document attends to min(p, r) tokens, where r, its position in the row,
    # is uniform in 1..context: q - q(q - 1) / (2 context) on average, q = min(p, context). The sum:
    total = near * (near + 1) / 2 - near * (near + 1) * (near - 1) / (6 * context_tokens)
    total += (document_tokens - near) * (context_tokens + 1) / 2
    return total / document_tokens
