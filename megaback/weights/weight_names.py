"""Comparison of a folder's weights with the model that its config describes.

Unexpected tensors are errors, as missing ones are: the config or the file is of another model.
Allowed are tensors that are derived from the config, the inverse frequencies of old Llamas.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from data_pipeline.errors import CheckpointCorruptError
from megaback.config import ModelSection
from megaback.model.rotary import frequencies

HEAD_NAME = "lm_head.weight"
EMBEDDING_NAME = "model.embed_tokens.weight"
_FREQUENCIES_SUFFIX = ".rotary_emb.inv_freq"
_NUM_NAMED = 3


def shapes_of(shape: ModelSection, vocab_size: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a model's tensors by name, without lm_head if it is tied to the embeddings.

    They are in the order of the model's parameters. No memory is allocated for these.
    """
    width, mlp_width, head_dim = shape.width, shape.hidden_mlp_width, shape.head_size
    query_width, kv_width = shape.query_width, shape.kv_width
    qk_norms = {"self_attn.q_norm": (head_dim,), "self_attn.k_norm": (head_dim,)}
    of_block: dict[str, tuple[int, ...]] = {
        "input_layernorm": (width,),
        "self_attn.q_proj": (query_width, width),
        "self_attn.k_proj": (kv_width, width),
        "self_attn.v_proj": (kv_width, width),
        "self_attn.o_proj": (width, query_width),
        **(qk_norms if shape.qk_norm else {}),
        "post_attention_layernorm": (width,),
        "mlp.gate_proj": (mlp_width, width),
        "mlp.up_proj": (mlp_width, width),
        "mlp.down_proj": (width, mlp_width),
    }
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING_NAME: (vocab_size, width)}
    for layer in range(shape.num_layers):
        shapes |= {f"model.layers.{layer}.{name}.weight": of_block[name] for name in of_block}
    shapes["model.norm.weight"] = (width,)
    if not shape.tie_embeddings:
        shapes[HEAD_NAME] = (vocab_size, width)
    return shapes


class NamedWeights(Protocol):
    """Reader of tensors by name."""

    def shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        """Name and shape of each tensor."""

    def read(self, name: str) -> Tensor:
        """Read a tensor."""


def require_exact(folder: Path, stored: NamedWeights, shape: ModelSection, vocab_size: int) -> None:
    """Raise CheckpointCorruptError unless the weights are exactly those of a model.

    Names and shapes are compared first, from the files' headers. A head that is stored in addition
    to tied embeddings must equal them.
    """
    wanted = shapes_of(shape, vocab_size)
    found = dict(stored.shapes())
    computed = [name for name in found if name.endswith(_FREQUENCIES_SUFFIX)]
    for name in computed:
        del found[name]
    is_head_twice = shape.tie_embeddings and {HEAD_NAME, EMBEDDING_NAME} <= found.keys()
    if is_head_twice:
        wanted[HEAD_NAME] = wanted[EMBEDDING_NAME]
    problems = [
        f"{name:.200} is missing"
        if name not in found
        else f"{name:.200} of shape {list(found[name])} is unexpected"
        if name not in wanted
        else f"{name} has shape {list(found[name])}, not {list(wanted[name])}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if problems:
        more = len(problems) - _NUM_NAMED
        others = f"; and {more} more" if more > 0 else ""
        raise CheckpointCorruptError(
            f"the weights in {folder} do not match the model of its config: "
            f"{'; '.join(problems[:_NUM_NAMED])}{others}; use the config that they were saved with"
        )
    for name in computed:
        _require_frequencies(folder, stored, name, shape)
    if is_head_twice and not torch.equal(stored.read(HEAD_NAME), stored.read(EMBEDDING_NAME)):
        raise CheckpointCorruptError(
            f"the config of {folder} ties the embeddings, but its weights have {HEAD_NAME} with "
            "other values; to use that head, set tie_word_embeddings to false there, otherwise "
            "remove the tensor"
        )


def _require_frequencies(
    folder: Path, stored: NamedWeights, name: str, shape: ModelSection
) -> None:
    """Raise CheckpointCorruptError unless they match the config's rope_theta to bf16 precision."""
    there, wanted = stored.read(name).float(), frequencies(shape, torch.device("cpu"))
    if there.shape != wanted.shape or not torch.allclose(there, wanted, rtol=1e-2, atol=0):
        raise CheckpointCorruptError(
            f"{name} in {folder} does not match rope_theta {shape.rope_theta:g} of its config; use "
            "the config that the weights were saved with"
        )
