"""Whether a folder's weights are exactly those of the model that its config describes.

A tensor that nothing reads is as much an error as one that is missing: the config, or the file, is
of another model. Only what a model computes from its config may lie beside: the inverse frequencies
that old Llamas carry.
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from data_pipeline.errors import CheckpointCorruptError
from megaback.config import ModelSection
from megaback.weight_files import StoredWeights

HEAD_NAME = "lm_head.weight"
EMBEDDING_NAME = "model.embed_tokens.weight"
_FREQUENCIES_SUFFIX = ".rotary_emb.inv_freq"
_NUM_NAMED = 3

Shapes = Mapping[str, tuple[int, ...]]


def require_exact(folder: Path, stored: StoredWeights, wanted: Shapes, shape: ModelSection) -> None:
    """Raise CheckpointCorruptError unless the weights have the wanted names and shapes, no others.

    A head that is stored beside tied embeddings must equal them.
    """
    found = dict(stored.shapes())
    for name in [name for name in found if name.endswith(_FREQUENCIES_SUFFIX)]:
        _require_frequencies(folder, stored, name, shape)
        del found[name]
    if shape.tie_embeddings and {HEAD_NAME, EMBEDDING_NAME} <= found.keys():
        if not torch.equal(stored.read(HEAD_NAME), stored.read(EMBEDDING_NAME)):
            raise CheckpointCorruptError(
                f"the config of {folder} ties the embeddings, and its file has {HEAD_NAME} with "
                "other values, which would be lost; if the head is meant, set tie_word_embeddings "
                "to false there, else remove the tensor"
            )
        del found[HEAD_NAME]
    problems = [
        f"{name} is missing"
        if name not in found
        else f"{name} of shape {list(found[name])} is read by nothing"
        if name not in wanted
        else f"{name} has shape {list(found[name])}, not {list(wanted[name])}"
        for name in sorted(found.keys() | wanted.keys())
        if found.get(name) != wanted.get(name)
    ]
    if problems:
        more = len(problems) - _NUM_NAMED
        others = f"; and {more} more" if more > 0 else ""
        raise CheckpointCorruptError(
            f"the weights in {folder} are not of the model that its config describes: "
            f"{'; '.join(problems[:_NUM_NAMED])}{others}"
        )


def _require_frequencies(
    folder: Path, stored: StoredWeights, name: str, shape: ModelSection
) -> None:
    """Raise unless they are what the config's rope_theta gives, as far as bf16 can tell."""
    exponents = torch.arange(0, shape.head_dim, 2, dtype=torch.float64) / shape.head_dim
    meant = shape.rope_theta**-exponents
    there = stored.read(name).double()
    if there.shape != meant.shape or not torch.allclose(there, meant, rtol=1e-2, atol=0):
        raise CheckpointCorruptError(
            f"{name} in {folder} has other frequencies than rope_theta {shape.rope_theta:g} of its "
            "config, by which the model would turn; use the config that the weights were saved with"
        )
