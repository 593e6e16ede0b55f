"""A trained model as a folder: weights in safetensors, what it is in `config.json`, its tokenizer.

This is what `megaback convert` writes (`--to full`, and `--to hf`, whose config.json is that of
transformers with a section of ours) and what sampling and `init_from` read. It holds no pickle.
config.json is written last: a folder without it is no model.
"""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.command import replacing, write_text
from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    RunMismatchError,
    TokenizerError,
)
from data_pipeline.manifest import TOKENIZER_NAME
from data_pipeline.number_ranges import finite_json
from data_pipeline.text import Direction, TextCodec, TextFormat, Unit
from megaback.attention import attention_backend
from megaback.config import ModelSection
from megaback.model import ReverseGPT
from megaback.sampler import Sampler
from megaback.stock_config import from_stock, is_stock
from megaback.tensor_file import SizeAndHash, Spec
from megaback.weight_files import StoredWeights, verify_weights, write_weights
from megaback.weight_names import require_exact

CONFIG_NAME = "config.json"
STOCK_SECTION = "megaback"
_FORMAT_NAME = "megaback-model"
_FORMAT_VERSION = 2


@dataclass(frozen=True)
class ModelDescription:
    """What a model is, beside its weights."""

    shape: ModelSection
    vocab_size: int
    context_tokens: int
    text_format: TextFormat
    step: int
    val_loss: float | None
    is_foreign: bool = False
    """Somebody else's Llama or Qwen3: nobody has said which direction it is for."""
    on_examples: bool = False
    """Whether instruction examples were trained on, as of BackChat."""

    def to_fields(self, files: Mapping[str, SizeAndHash]) -> dict[str, Any]:
        """What config.json says in our words."""
        return {
            "format": _FORMAT_NAME,
            "version": _FORMAT_VERSION,
            **self.text_format.to_dict(),
            "model": self.shape.model_dump(mode="json"),
            "vocab_size": self.vocab_size,
            "context_tokens": self.context_tokens,
            "step": self.step,
            "val_loss": self.val_loss,
            "on_examples": self.on_examples,
            "files": files,
        }


def write_model_folder(
    folder: Path,
    description: ModelDescription,
    specs: Mapping[str, Spec],
    tensor_of: Callable[[str], Tensor],
    tokenizer: bytes,
    most_file_bytes: int,
) -> None:
    """Write a model folder, a tensor at a time; the caller gives it its final name."""
    files = write_weights(folder, specs, tensor_of, most_file_bytes)
    with replacing(folder / TOKENIZER_NAME) as file:
        file.write(tokenizer)
    write_text(folder / CONFIG_NAME, json.dumps(description.to_fields(files), indent=2) + "\n")


def _config_fields(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG_NAME
    if not path.is_file():
        raise CheckpointMissingError(
            f"{folder} is not a model's folder (it has no {CONFIG_NAME}); name one that "
            "`megaback convert` wrote"
        )
    try:
        fields = finite_json(path.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise _no_description(path, error) from None
    return fields


def _no_description(path: Path, error: Exception) -> CheckpointCorruptError:
    reason = " ".join(str(error).split())
    return CheckpointCorruptError(
        f"{path} does not describe a model of this version ({reason}); convert it again"
    )


def _our_fields(folder: Path) -> dict[str, Any] | None:
    """What config.json says in our words; None for somebody else's model."""
    fields = _config_fields(folder)
    ours = fields.get(STOCK_SECTION) if is_stock(fields) else fields
    return ours if isinstance(ours, dict) else None


def is_ours(folder: Path) -> bool:
    """Whether a folder's config.json is one that `megaback convert` wrote.

    Raises CheckpointMissingError, CheckpointCorruptError.
    """
    fields = _our_fields(folder)
    return fields is not None and fields.get("format") == _FORMAT_NAME


def read_description(folder: Path) -> ModelDescription:
    """Raises CheckpointMissingError, CheckpointCorruptError or, for what does not fit at all,
    RunMismatchError."""
    path = folder / CONFIG_NAME
    fields = _our_fields(folder)
    if fields is None:
        return _describe_foreign(folder)
    try:
        if (fields["format"], fields["version"]) != (_FORMAT_NAME, _FORMAT_VERSION):
            raise ValueError("another format or version")
        return ModelDescription(
            ModelSection.model_validate(fields["model"]),
            fields["vocab_size"],
            fields["context_tokens"],
            TextFormat.from_dict(fields),
            fields["step"],
            fields["val_loss"],
            on_examples=bool(fields.get("on_examples", False)),  # earlier ones do not say
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _no_description(path, error) from None


def _describe_foreign(folder: Path) -> ModelDescription:
    """A Llama's or Qwen3's folder with a SentencePiece model."""
    fields = _config_fields(folder)
    shape = from_stock(fields, str(folder / CONFIG_NAME))
    try:
        tokenizer = (folder / TOKENIZER_NAME).read_bytes()
    except OSError as error:
        raise TokenizerError(
            f"cannot read the tokenizer {folder / TOKENIZER_NAME}: {error.strerror}; "
            "a model of another library needs its SentencePiece model"
        ) from None
    try:
        return ModelDescription(
            shape,
            int(fields["vocab_size"]),
            int(fields["max_position_embeddings"]),
            TextFormat(Direction.FORWARD, Unit.TOKEN, hashlib.sha256(tokenizer).hexdigest()),
            step=0,
            val_loss=None,
            is_foreign=True,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _no_description(folder / CONFIG_NAME, error) from None


def stored_files(folder: Path) -> dict[str, SizeAndHash]:
    """The files of weights as they were written; none of somebody else's model.

    Raises CheckpointCorruptError.
    """
    fields = _our_fields(folder)
    if fields is None:
        return {}
    try:
        return {name: (int(size), str(sha)) for name, (size, sha) in fields["files"].items()}
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise _no_description(folder / CONFIG_NAME, error) from None


def open_weights(folder: Path) -> StoredWeights:
    """Raises CheckpointCorruptError when the weights are missing, cut short or altered."""
    verify_weights(folder, stored_files(folder))
    return StoredWeights(folder)


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Raises CheckpointCorruptError when the weights are missing, cut short or altered."""
    stored = open_weights(folder)
    return {name: stored.read(name) for name, _ in stored.shapes()}


def load_weights(model: ReverseGPT, folder: Path) -> None:
    """Fill a model from a folder. Raises CheckpointCorruptError when it holds others' weights."""
    stored = open_weights(folder)
    wanted = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    require_exact(folder, stored, wanted, model.shape)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(stored.read(name))


def load_model_folder(
    folder: Path, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[ReverseGPT, ModelDescription, TextCodec]:
    """A model, with the codec that its texts go through."""
    description = read_description(folder)
    text_format = description.text_format
    codec = TextCodec.load(folder / TOKENIZER_NAME, text_format.direction, text_format.unit)
    text_format.require_same(codec.format, f"the model {folder}", f"{folder / TOKENIZER_NAME}")
    if codec.vocab_size != description.vocab_size:
        raise RunMismatchError(
            f"{folder} has a vocabulary of {description.vocab_size} and a tokenizer of "
            f"{codec.vocab_size} pieces; use the tokenizer that the model was trained with"
        )
    _, backend = attention_backend("auto", device, dtype, description.shape.head_dim)
    with torch.device("meta"):
        model = ReverseGPT(description.shape, description.vocab_size, backend)
    model.to(dtype).to_empty(device=device)
    if description.shape.tie_embeddings:  # which the line above makes two
        model.lm_head.weight = model.model.embed_tokens.weight
    load_weights(model, folder)
    return model.eval(), description, codec


def load_sampler(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    *,
    usual_rows: int = 1,
    compiled: bool = False,
) -> tuple[Sampler, ModelDescription, TextCodec]:
    """A model ready to write, with the codec that its texts go through."""
    model, description, codec = load_model_folder(folder, device, dtype)
    sampler = Sampler(model, description.context_tokens, usual_rows=usual_rows, compiled=compiled)
    return sampler, description, codec
