"""A trained model as a folder: weights in safetensors, what it is in `config.json`, its tokenizer.

This is what `megaback convert --to full` writes and what sampling and `init_from` read. It holds no
pickle. config.json is written last: a folder without it is no model.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.command import replacing, write_text
from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError
from data_pipeline.manifest import TOKENIZER_NAME
from data_pipeline.text import TextCodec, TextFormat
from megaback.attention import attention_backend
from megaback.config import ModelSection
from megaback.model import ReverseGPT

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
_FORMAT_NAME = "megaback-model"
_FORMAT_VERSION = 1


@dataclass(frozen=True)
class ModelDescription:
    """What a model is, beside its weights."""

    shape: ModelSection
    vocab_size: int
    context_tokens: int
    text_format: TextFormat
    step: int
    val_loss: float | None


def save_model_folder(
    folder: Path, description: ModelDescription, weights: dict[str, Tensor], tokenizer: bytes
) -> None:
    """Write a model folder; the caller gives it its final name."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    save_file(weights, folder / WEIGHTS_NAME, metadata={"format": "pt"})
    (folder / WEIGHTS_NAME).chmod(folder.stat().st_mode & 0o666)  # as readable as its folder
    with replacing(folder / TOKENIZER_NAME) as file:
        file.write(tokenizer)
    fields: dict[str, Any] = {
        "format": _FORMAT_NAME,
        "version": _FORMAT_VERSION,
        **description.text_format.to_dict(),
        "model": description.shape.model_dump(mode="json"),
        "vocab_size": description.vocab_size,
        "context_tokens": description.context_tokens,
        "step": description.step,
        "val_loss": description.val_loss,
    }
    write_text(folder / CONFIG_NAME, json.dumps(fields, indent=2) + "\n")


def read_description(folder: Path) -> ModelDescription:
    """Raises CheckpointMissingError or CheckpointCorruptError."""
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointMissingError(
            f"{folder} is not a model's folder (it has no {CONFIG_NAME}); "
            f"make one with `megaback convert CHECKPOINT --to full --out {folder}`"
        )
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        if (fields["format"], fields["version"]) != (_FORMAT_NAME, _FORMAT_VERSION):
            raise ValueError("another format or version")
        return ModelDescription(
            ModelSection.model_validate(fields["model"]),
            fields["vocab_size"],
            fields["context_tokens"],
            TextFormat.from_dict(fields),
            fields["step"],
            fields["val_loss"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointCorruptError(
            f"{path} does not describe a model of this version ({error}); convert it again"
        ) from None


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Raises CheckpointCorruptError when the weights are missing, cut short or altered."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        weights: dict[str, Tensor] = load_file(folder / WEIGHTS_NAME)
    except (OSError, SafetensorError) as error:
        raise CheckpointCorruptError(
            f"cannot read the weights {folder / WEIGHTS_NAME}: {error}; convert them again"
        ) from None
    return weights


def load_weights(model: ReverseGPT, folder: Path) -> None:
    """Fill a model from a folder. Raises CheckpointCorruptError when names or shapes differ."""
    weights = read_weights(folder)
    if model.shape.tie_embeddings:
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())
        raise CheckpointCorruptError(
            f"the weights in {folder} are not of the model that its config describes: {reason}"
        ) from None


def load_model_folder(
    folder: Path, device: torch.device
) -> tuple[ReverseGPT, ModelDescription, TextCodec]:
    """A model ready to sample from, with the codec that its prompts go through."""
    description = read_description(folder)
    text_format = description.text_format
    codec = TextCodec.load(folder / TOKENIZER_NAME, text_format.direction, text_format.unit)
    text_format.require_same(codec.format, f"the model {folder}", f"{folder / TOKENIZER_NAME}")
    _, backend = attention_backend("auto", device, torch.float32, description.shape.head_dim)
    model = ReverseGPT(description.shape, description.vocab_size, backend)
    load_weights(model, folder)
    return model.to(device).eval(), description, codec
