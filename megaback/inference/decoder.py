"""Inference-optimized decoder with a KV cache: one token per row and step, for many rows.

Equal to `ReverseGPT` up to rounding, with fewer operations per token: products of the same input
are fused, weights are packed for the CPU's kernels, rotary embeddings are looked up, and the cache
is allocated once.

Shapes: N tokens, B rows, D width, H query heads, K key and value heads, G query heads a key head, E
head dimension, F MLP width, V vocabulary.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812 - the field's name for it
from torch import Tensor, nn

from data_pipeline.text.codec import Direction, TextCodec
from megaback.inference.cuda_graph import Capture, CudaCapture, why_no_graphs
from megaback.inference.kv_cache import CacheView, KeyValueCache, LayerState
from megaback.inference.steps import Steps
from megaback.inference.token_scores import ScoredToken, packed_scores, scored_token
from megaback.model.compiler import require_compiler
from megaback.model.gpt import Attention, Block, ReverseGPT
from megaback.model.rotary import Rotary
from megaback.weights.model_folder import ModelDescription, load_model_folder

_LOG = logging.getLogger("megaback.inference")

Product = Callable[[Tensor], Tensor]
"""hidden_ND -> its product with a matrix."""
_Attend = Callable[[int, Tensor, Tensor, Tensor], Tensor]
"""(layer, query_NHE, key_NKE, value_NKE) -> attended_NHE"""
_LOGIT_ROWS = 256
"""Positions whose logits are computed at once: those of a long text would take a gigabyte."""


@dataclass(frozen=True, kw_only=True)
class _Layer:
    attention_norm_D: Tensor
    query_key_value: Product
    query_key_norm_HE: Tensor | None
    """Norm weights of query heads, then of key heads."""
    output: Product
    mlp_norm_D: Tensor
    gate_up: Product
    down: Product


class Decoder:
    """A model's weights, packed to compute the logits of next ids."""

    def __init__(
        self,
        model: ReverseGPT,
        context_tokens: int,
        *,
        usual_rows: int = 1,
        takes_over: bool = True,
        compiled: bool = False,
        cuda_graphs: bool = True,
    ) -> None:
        """Pack a model's weights, which may empty the model; without `takes_over`, only read them.

        Reading them is slower. `usual_rows`: number of rows to optimize for on a CPU; any number
        works. `compiled` has torch.compile fuse the operations between the products; the first
        tokens then take long. `cuda_graphs`: capture the steps of batches on a CUDA device.
        """
        self.shape = model.shape
        self.vocab_size = model.vocab_size
        self.context_tokens = context_tokens
        self.num_parameters = model.num_parameters()
        weight = model.lm_head.weight
        self.device, self.dtype = weight.device, weight.dtype
        # On a CPU attention in bf16 is slower than in fp32, in which the keys are computed anyway.
        self.cache_dtype = torch.float32 if self.device.type == "cpu" else self.dtype
        packs = takes_over and not compiled and _can_pack(self.device, self.dtype)
        is_one_row = usual_rows == 1 and self.dtype is torch.float32
        pack = (_transposed if is_one_row else _packed) if packs else _stacked
        if not takes_over:
            pack = _unpacked
        self.model = None if packs else model
        """The model, which has the same weights in memory; None if packing has emptied it."""
        self._embedding_VD = model.model.embed_tokens.weight.detach()
        self._head = pack([model.lm_head])
        self._layers = []
        for block in model.model.layers:
            assert isinstance(block, Block)
            self._layers.append(_packed_layer(block, pack))
            if packs:  # only one layer's weights are in memory twice
                _release_weights(block)
        self._norm_D = model.model.norm.weight.detach()
        positions = torch.arange(context_tokens, device=self.device)
        rotary = Rotary.at(positions, self.shape)
        # Rotation adds the other half, times a sine that is negative for the first half.
        signs_E = torch.ones(self.shape.head_size, device=self.device)
        signs_E[: self.shape.head_size // 2] = -1
        self._rotation = (rotary.cos_T1E, rotary.sin_T1E * signs_E)
        if compiled:
            require_compiler(self.device.type, "`compiled`")
        self._compiled = compiled
        self.logits = torch.compile(self._logits, dynamic=True) if compiled else self._logits
        self.idle_batch: object = None
        """The `ContinuousBatch` that has captured its steps, for the next samples."""
        self.capture: Capture | None = None
        """Captures the steps of batches; None if they are run as they are."""
        if cuda_graphs and self.device.type != "cpu":
            reason = why_no_graphs(self.device)
            if reason is None:
                self.capture = CudaCapture(self.device)
            else:
                _LOG.info("text is written without CUDA graphs: %s", reason)

    def new_cache(self, num_rows: int) -> KeyValueCache:
        """An empty cache, with room for the whole context of each row."""
        shape = self.shape
        return KeyValueCache(
            shape.num_layers,
            num_rows,
            shape.kv_heads,
            self.context_tokens,
            shape.head_size,
            self.cache_dtype,
            self.device,
        )

    @torch.inference_mode()
    def read_steps(self, ids: Sequence[int]) -> Steps[list[LayerState]]:
        """Prefill: the keys and values of a row's first tokens, if any; one layer per step."""
        kept: list[LayerState] = []

        def attend(_layer: int, query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor) -> Tensor:
            key_KNE, value_KNE = key_NKE.transpose(0, 1), value_NKE.transpose(0, 1)
            kept.append((key_KNE.to(self.cache_dtype), value_KNE.to(self.cache_dtype)))
            return _causal(query_NHE, key_NKE, value_NKE)

        if not ids:
            nothing = torch.zeros(self.shape.kv_heads, 0, self.shape.head_size, device=self.device)
            return [(nothing, nothing)] * self.shape.num_layers
        yield from self._row_steps(ids, attend)
        return kept

    @torch.inference_mode()
    def score_steps(
        self, given: Sequence[int], written: Sequence[int], num_likeliest: int = 0
    ) -> Steps[list[ScoredToken]]:
        """Log-probability of each id of `written` after all ids before it.

        `given` has at least one id; both together, without the last, fit the context. A step is a
        layer, or the logits of a few positions.
        """

        def attend(_layer: int, query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor) -> Tensor:
            return _causal(query_NHE, key_NKE, value_NKE)

        hidden_ND = yield from self._row_steps([*given, *written][:-1], attend)
        ids_N = torch.tensor(written, dtype=torch.long, device=self.device)
        parts = torch.split(hidden_ND[len(given) - 1 :], _LOGIT_ROWS)
        scored: list[ScoredToken] = []
        for part_ND, part_N in zip(parts, torch.split(ids_N, _LOGIT_ROWS), strict=True):
            packed_NS = packed_scores(self._head(part_ND).float(), part_N, num_likeliest)
            scored += map(scored_token, packed_NS.tolist())
            yield
        return scored

    @torch.inference_mode()
    def step(self, ids_B: Tensor, cache: KeyValueCache) -> Tensor:
        """Append an id to every row; logits of the next ids in fp32: shape (B, V).

        The host does not wait for the device.
        """
        view = cache.full_view() if self._compiled else cache.view()
        logits_BV = self.logits(ids_B, cache.positions, view)
        cache.advance()
        return logits_BV

    def _logits(self, ids_B: Tensor, positions_B: Tensor, view: CacheView) -> Tensor:
        """Logits of the ids after these in fp32, whose keys and values are written: (B, V)."""

        def attend(layer: int, query_BHE: Tensor, key_BKE: Tensor, value_BKE: Tensor) -> Tensor:
            keys_BKSE, values_BKSE = view.layers[layer]
            keys_BKSE[view.place] = key_BKE.to(self.cache_dtype)
            values_BKSE[view.place] = value_BKE.to(self.cache_dtype)
            # Queries that share a key head take the place of a sequence of queries.
            query_BKGE = query_BHE.reshape(len(key_BKE), key_BKE.shape[1], -1, self.shape.head_size)
            attended_BKGE = F.scaled_dot_product_attention(
                query_BKGE.to(self.cache_dtype), keys_BKSE, values_BKSE, attn_mask=view.visible
            )
            return attended_BKGE.flatten(1, 2)

        cos_T1E, sin_T1E = self._rotation
        rotation = cos_T1E[positions_B], sin_T1E[positions_B]
        return self._head(self._hidden(ids_B, rotation, attend)).float()

    def _row_steps(self, ids: Sequence[int], attend: _Attend) -> Steps[Tensor]:
        """Hidden states of a new row: shape (N, D). A step is a layer."""
        cos_T1E, sin_T1E = self._rotation
        rotation = cos_T1E[: len(ids)], sin_T1E[: len(ids)]
        ids_N = torch.tensor(ids, device=self.device)
        hidden_ND = F.embedding(ids_N, self._embedding_VD)
        for number in range(len(self._layers)):
            hidden_ND = self._after_layer(number, hidden_ND, rotation, attend)
            yield
        return _normed(hidden_ND, self._norm_D, self.shape.norm_epsilon)

    def _hidden(self, ids_N: Tensor, rotation: tuple[Tensor, Tensor], attend: _Attend) -> Tensor:
        """Hidden states after the final norm: shape (N, D)."""
        hidden_ND = F.embedding(ids_N, self._embedding_VD)
        for number in range(len(self._layers)):
            hidden_ND = self._after_layer(number, hidden_ND, rotation, attend)
        return _normed(hidden_ND, self._norm_D, self.shape.norm_epsilon)

    def _after_layer(
        self, number: int, hidden_ND: Tensor, rotation: tuple[Tensor, Tensor], attend: _Attend
    ) -> Tensor:
        """Hidden states after a layer, from those before it: shape (N, D)."""
        shape, layer = self.shape, self._layers[number]
        epsilon = shape.norm_epsilon
        num_rotated = shape.num_heads + shape.kv_heads
        cos_N1E, sin_N1E = rotation
        normed_ND = _normed(hidden_ND, layer.attention_norm_D, epsilon)
        projected_ND = layer.query_key_value(normed_ND)
        projected_NHE = projected_ND.view(len(hidden_ND), -1, shape.head_size)
        rotated_NHE = projected_NHE[:, :num_rotated]
        if layer.query_key_norm_HE is not None:
            rotated_NHE = _normed(rotated_NHE, layer.query_key_norm_HE, epsilon)
        rotated_NHE = rotated_NHE.float()
        swapped_NHE = rotated_NHE.roll(shape.head_size // 2, dims=-1)
        rotated_NHE = torch.addcmul(rotated_NHE * cos_N1E, swapped_NHE, sin_N1E).to(self.dtype)
        query_NHE, key_NKE = rotated_NHE[:, : shape.num_heads], rotated_NHE[:, shape.num_heads :]
        attended_NHE = attend(number, query_NHE, key_NKE, projected_NHE[:, num_rotated:])
        hidden_ND = hidden_ND + layer.output(attended_NHE.flatten(1).to(self.dtype))
        normed_ND = _normed(hidden_ND, layer.mlp_norm_D, epsilon)
        gate_NF, up_NF = layer.gate_up(normed_ND).chunk(2, dim=-1)
        return hidden_ND + layer.down(F.silu(gate_NF) * up_NF)


def _causal(query_NHE: Tensor, key_NKE: Tensor, value_NKE: Tensor) -> Tensor:
    """Causal attention within one row: shape (N, H, E)."""
    groups = query_NHE.shape[1] // key_NKE.shape[1]
    return F.scaled_dot_product_attention(
        query_NHE.transpose(0, 1)[None],
        key_NKE.transpose(0, 1).repeat_interleave(groups, dim=0)[None],
        value_NKE.transpose(0, 1).repeat_interleave(groups, dim=0)[None],
        is_causal=True,
    )[0].transpose(0, 1)


def _normed(hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """As `RMSNorm`, which casts to fp32 and back: PyTorch does that within its kernel."""
    return F.rms_norm(hidden, hidden.shape[-1:], eps=epsilon) * weight


def _packed_layer(block: Block, pack: Callable[[list[nn.Linear]], Product]) -> _Layer:
    attention: Attention = block.self_attn
    norms_HE = None
    if attention.q_norm is not None and attention.k_norm is not None:
        num_heads = attention.q_proj.out_features // attention.head_dim
        kv_heads = attention.k_proj.out_features // attention.head_dim
        both = [attention.q_norm.weight.detach()] * num_heads
        norms_HE = torch.stack(both + [attention.k_norm.weight.detach()] * kv_heads)
    return _Layer(
        attention_norm_D=block.input_layernorm.weight.detach(),
        query_key_value=pack([attention.q_proj, attention.k_proj, attention.v_proj]),
        query_key_norm_HE=norms_HE,
        output=pack([attention.o_proj]),
        mlp_norm_D=block.post_attention_layernorm.weight.detach(),
        gate_up=pack([block.mlp.gate_proj, block.mlp.up_proj]),
        down=pack([block.mlp.down_proj]),
    )


def _release_weights(block: Block) -> None:
    for module in block.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(torch.empty(0))


def _unpacked(matrices: list[nn.Linear]) -> Product:
    weights = [matrix.weight.detach() for matrix in matrices]
    return lambda hidden_ND: torch.cat([F.linear(hidden_ND, weight) for weight in weights], dim=-1)


def _stacked(matrices: list[nn.Linear]) -> Product:
    """One product; the matrices become parts of its weight."""
    weight = matrices[0].weight.detach()
    if len(matrices) > 1:
        weight = torch.cat([matrix.weight.detach() for matrix in matrices])
        parts = torch.split(weight, [matrix.out_features for matrix in matrices])
        for matrix, part in zip(matrices, parts, strict=True):
            matrix.weight = nn.Parameter(part, requires_grad=False)
    return lambda hidden_ND: F.linear(hidden_ND, weight)


def _can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this machine has oneDNN's kernels for a type."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        return False
    return dtype is torch.float32 or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def _transposed(matrices: list[nn.Linear]) -> Product:
    """Transposed, which is faster than `F.linear` for one row in fp32 with many outputs."""
    stacked = torch.cat([matrix.weight.detach() for matrix in matrices])
    if len(stacked) < stacked.shape[1]:
        return _packed(matrices, 1)
    weight = stacked.t().contiguous()
    return lambda hidden_ND: torch.mm(hidden_ND, weight)


def _packed(matrices: list[nn.Linear], rows: int = 16) -> Product:
    """In the blocked layout of oneDNN's kernels, as torch.compile packs frozen weights.

    With many rows, or one row in bf16, this saves reordering the weights at every call.
    """
    linear = torch.ops.mkldnn._linear_pointwise.default
    stacked = torch.cat([matrix.weight.detach() for matrix in matrices])
    weight = torch.ops.mkldnn._reorder_linear_weight(stacked, rows)
    return lambda hidden_ND: linear(hidden_ND, weight, None, "none", [], "")


def load_decoder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    usual_rows: int = 1,
    compiled: bool = False,
    cuda_graphs: bool = True,
    direction: Direction | None = None,
) -> tuple[Decoder, ModelDescription, TextCodec]:
    """A decoder of the model in a folder, with its description and codec."""
    model, description, codec = load_model_folder(folder, device, dtype, direction)
    decoder = Decoder(
        model,
        description.context_tokens,
        usual_rows=usual_rows,
        compiled=compiled,
        cuda_graphs=cuda_graphs,
    )
    return decoder, description, codec
