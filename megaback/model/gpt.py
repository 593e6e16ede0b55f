"""GPT decoder for packed documents, from embedding to logits in one file.

A stock architecture, so that exports run anywhere: pre-norm RMSNorm, rotary positions,
grouped-query attention, SwiGLU, no biases. Without `qk_norm` it is Llama's, with it Qwen3's, with
their parameter names in transformers. The model is independent of the direction: it predicts the
next id.

Shapes: T packed tokens, D width, H query heads, K key and value heads, E head dimension, F MLP
width, V vocabulary, S segments.
"""

from collections.abc import Callable
from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from megaback.config import LOSS_CHUNK_TOKENS, ModelSection
from megaback.model.attention import AttentionBackend, Segments, sdpa_attention
from megaback.model.mup import initial_weights
from megaback.model.output_head import OutputHead
from megaback.model.rotary import Rotary


class Elementwise(Protocol):
    """Caller of a cheap function without weights, such as a norm or a rotation."""

    def __call__(self, function: Callable[..., Tensor], *arguments: object) -> Tensor: ...


def _kept(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    return function(*arguments)


def _recomputed(function: Callable[..., Tensor], *arguments: object) -> Tensor:
    """Save only the arguments, which are saved anyway, and recompute the intermediate tensors.

    Such functions are cheap compared to matrix products, and account for most activation memory.
    """
    result: Tensor = checkpoint(
        function,
        *arguments,
        use_reentrant=False,
        preserve_rng_state=False,  # there is no dropout
    )
    return result


class RMSNorm(nn.Module):
    """Root mean square norm over the last dimension, computed in fp32."""

    elementwise: Elementwise = staticmethod(_kept)

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.epsilon = epsilon

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * self.elementwise(_rms_normed, hidden, self.epsilon)


def _rms_normed(hidden: Tensor, epsilon: float) -> Tensor:
    normed = F.rms_norm(hidden.float(), hidden.shape[-1:], eps=epsilon)
    return normed.to(hidden.dtype)


class Attention(nn.Module):
    """Grouped-query attention with rotary positions."""

    elementwise: Elementwise = staticmethod(_kept)

    def __init__(self, shape: ModelSection, backend: AttentionBackend) -> None:
        super().__init__()
        query_width, kv_width = shape.query_width, shape.kv_width
        self.head_dim = shape.head_size
        self.backend = backend
        self.q_proj = nn.Linear(shape.width, query_width, bias=False)
        self.k_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.v_proj = nn.Linear(shape.width, kv_width, bias=False)
        self.o_proj = nn.Linear(query_width, shape.width, bias=False)
        self.q_norm = RMSNorm(shape.head_size, shape.norm_epsilon) if shape.qk_norm else None
        self.k_norm = RMSNorm(shape.head_size, shape.norm_epsilon) if shape.qk_norm else None

    def forward(self, hidden_TD: Tensor, rotary: Rotary, segments: Segments) -> Tensor:
        query_THE = self.q_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        key_TKE = self.k_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        value_TKE = self.v_proj(hidden_TD).unflatten(-1, (-1, self.head_dim))
        if self.q_norm is not None and self.k_norm is not None:
            query_THE, key_TKE = self.q_norm(query_THE), self.k_norm(key_TKE)
        # Kernels need one dtype. In autocast the norms' weights make queries and keys fp32.
        query_THE = self.elementwise(rotary.turn, query_THE, value_TKE.dtype)
        key_TKE = self.elementwise(rotary.turn, key_TKE, value_TKE.dtype)
        attended_THE = self.backend(query_THE, key_TKE, value_TKE, segments)
        output_TD: Tensor = self.o_proj(attended_THE.flatten(1))
        return output_TD


class GatedMLP(nn.Module):
    """SwiGLU: Shazeer, "GLU Variants Improve Transformer" (2020)."""

    elementwise: Elementwise = staticmethod(_kept)

    def __init__(self, width: int, hidden_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden_width, bias=False)
        self.up_proj = nn.Linear(width, hidden_width, bias=False)
        self.down_proj = nn.Linear(hidden_width, width, bias=False)

    def forward(self, hidden_TD: Tensor) -> Tensor:
        gated_TF = self.elementwise(_gated, self.gate_proj(hidden_TD), self.up_proj(hidden_TD))
        output_TD: Tensor = self.down_proj(gated_TF)
        return output_TD


def _gated(gate_TF: Tensor, up_TF: Tensor) -> Tensor:
    return F.silu(gate_TF) * up_TF


class Block(nn.Module):
    """Attention, then MLP, each with a residual connection."""

    def __init__(self, shape: ModelSection, backend: AttentionBackend) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(shape.width, shape.norm_epsilon)
        self.self_attn = Attention(shape, backend)
        self.post_attention_layernorm = RMSNorm(shape.width, shape.norm_epsilon)
        self.mlp = GatedMLP(shape.width, shape.hidden_mlp_width)

    def forward(self, hidden_TD: Tensor, rotary: Rotary, segments: Segments) -> Tensor:
        attended_TD = self.self_attn(self.input_layernorm(hidden_TD), rotary, segments)
        hidden_TD = hidden_TD + attended_TD
        mixed_TD: Tensor = self.mlp(self.post_attention_layernorm(hidden_TD))
        return hidden_TD + mixed_TD


class Transformer(nn.Module):
    """Embedding, blocks and final norm."""

    def __init__(self, shape: ModelSection, vocab_size: int, backend: AttentionBackend) -> None:
        super().__init__()
        # Zeros until `initialize` or loading: on the meta device, nn.Embedding's initialization
        # would import the compiler.
        zeros_VD = torch.zeros(vocab_size, shape.width)
        self.embed_tokens = nn.Embedding.from_pretrained(zeros_VD, freeze=False)  # type: ignore[no-untyped-call]
        self.layers = nn.ModuleList(Block(shape, backend) for _ in range(shape.num_layers))
        self.norm = RMSNorm(shape.width, shape.norm_epsilon)


class ReverseGPT(nn.Module):
    """The whole model: `forward` computes losses, `logits` the logits of the next id."""

    def __init__(
        self,
        shape: ModelSection,
        vocab_size: int,
        backend: AttentionBackend = sdpa_attention,
        activation_checkpointing: str = "none",
        z_loss: float = 0.0,
        loss_chunk_tokens: int = LOSS_CHUNK_TOKENS,
    ) -> None:
        """`activation_checkpointing`, `z_loss` and `loss_chunk_tokens`: as in the config."""
        super().__init__()
        self.shape = shape
        self.vocab_size = vocab_size
        self.z_loss = z_loss
        self.model = Transformer(shape, vocab_size, backend)
        self.lm_head = OutputHead(shape.width, vocab_size, loss_chunk_tokens)
        if shape.tie_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.checkpoint_activations(activation_checkpointing)

    def checkpoint_activations(self, kind: str) -> None:
        """Set the activations that backward passes recompute: `none`, `selective` or `block`."""
        self.activation_checkpointing = kind
        call = _recomputed if kind == "selective" else _kept
        for module in self.modules():
            if isinstance(module, RMSNorm | Attention | GatedMLP):
                module.elementwise = call

    def exclude_attention_from_compile(self) -> None:
        """Disable compilation of attention, for backends that torch.compile does not trace.

        Not at import, which would load the compiler for inference too.
        """
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = torch.compiler.disable(module.backend)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def initialize(self, seed: int) -> None:
        """Copy the weights of `initial_weights`."""
        weights = dict(self.named_parameters())
        for name, initial in initial_weights(self.shape, self.shapes(), seed):
            weights[name].copy_(initial)

    def hidden(self, ids_T: Tensor, positions_T: Tensor, segments: Segments) -> Tensor:
        """Hidden states after the final norm: shape (T, D)."""
        hidden_TD: Tensor = self.model.embed_tokens(ids_T)
        rotary = Rotary.at(positions_T, self.shape)
        for block in self.model.layers:
            if self.activation_checkpointing == "block" and self.training:
                hidden_TD = checkpoint(
                    block,
                    hidden_TD,
                    rotary,
                    segments,
                    use_reentrant=False,
                    preserve_rng_state=False,
                )
            else:
                hidden_TD = block(hidden_TD, rotary, segments)
        normed_TD: Tensor = self.model.norm(hidden_TD)
        return normed_TD

    def logits(self, ids_T: Tensor, positions_T: Tensor, segments: Segments) -> Tensor:
        """Logits of the next id in the model's direction: shape (T, V)."""
        logits_TV: Tensor = self.lm_head(self.hidden(ids_T, positions_T, segments))
        return logits_TV

    def forward(
        self, ids_T: Tensor, targets_T: Tensor | None, positions_T: Tensor, segments: Segments
    ) -> Tensor:
        """Cross-entropy of each target in nats, 0 where it is ignored: shape (T,), in fp32.

        Without targets, the logits of the id after each segment: shape (segments, V). Calls of the
        module, unlike those of `logits`, may be made through DeepSpeed at any stage.

        In training, the gradient includes that of the z-loss, z_loss * log(sum(exp(logits)))^2
        (Chowdhery et al., "PaLM", 2022); the value does not. The losses can be summed or averaged,
        not weighted: their gradient is that of their sum (`OutputHead`).
        """
        hidden_TD = self.hidden(ids_T, positions_T, segments)
        if targets_T is None:
            logits_SV: Tensor = self.lm_head(hidden_TD[segments.cu_seqlens[1:] - 1])
            return logits_SV
        nats_T: Tensor = self.lm_head(hidden_TD, targets_T, self.z_loss if self.training else 0.0)
        return nats_T

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the parameters by name, in order."""
        return {name: tuple(parameter.shape) for name, parameter in self.named_parameters()}

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
