"""Tensors of a model, from a checkpoint of any world size and stage or from a model folder."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from data_pipeline.common.file_names import path_within
from data_pipeline.errors import CheckpointCorruptError
from data_pipeline.redaction import shown_url
from data_pipeline.text.tokenizer import find_tokenizer
from megaback.checkpoints.checkpoint import CheckpointMeta, config_of, find_checkpoint, saved_state
from megaback.checkpoints.frozen_weights import open_frozen, require_shapes
from megaback.checkpoints.safetensors_file import Spec
from megaback.checkpoints.saved_runs import WEIGHT
from megaback.config import Config
from megaback.model.gpt import ReverseGPT
from megaback.model.lora import LowRankUpdates, with_updates
from megaback.origins import WeightsIdentity
from megaback.planning.adapters import adapter_shapes, factors_of_matrices
from megaback.run_folder import MODEL_CONFIG_NAME
from megaback.weights.identity import Branching, Training
from megaback.weights.model_folder import (
    ModelDescription,
    open_weights,
    read_description,
    read_tokenizer,
    tokenizer_of,
)
from megaback.weights.weight_names import shapes_of


@dataclass(frozen=True)
class WeightSource:
    """A model's description and tokenizer, and a reader of its weights by name."""

    description: ModelDescription
    tokenizer: bytes
    shapes: dict[str, tuple[int, ...]]
    read: Callable[[str], Tensor]
    updates: LowRankUpdates | None = None
    """Factors of a run with LoRA, whose weights are read merged."""

    @torch.no_grad()
    def fill(self, model: ReverseGPT) -> None:
        """Copy the weights into a model of the same shape."""
        for name, parameter in model.named_parameters():
            parameter.copy_(self.read(name))

    def specs(self, dtype: torch.dtype) -> dict[str, Spec]:
        """Specs of all tensors in one type, without lm_head if it is tied to the embeddings."""
        return {name: (dtype, shape) for name, shape in self.shapes.items()}


def open_source(path: Path, part: int = 0, parts: int = 1) -> WeightSource:
    """Verify (a part of) and open a model folder, run or checkpoint.

    Raises CheckpointMissingError, CheckpointCorruptError, and the errors of `read_description`.
    """
    is_folder = (path / MODEL_CONFIG_NAME).is_file()
    return (_from_folder if is_folder else open_checkpoint)(path, part, parts)


def open_checkpoint(path: Path, part: int = 0, parts: int = 1) -> WeightSource:
    """Verify (a part of) and open the checkpoint of a path.

    Raises the errors of `find_checkpoint`.
    """
    target, meta = find_checkpoint(path, part, parts)
    config = config_of(target, meta)
    description = ModelDescription(
        shape=config.model,
        vocab_size=meta.vocab_size,
        context_tokens=config.batch.context_tokens,
        text_format=meta.format,
        step=meta.step,
        val_loss=meta.val_loss,
        on_examples=meta.on_examples,
        branch=_branching_of(meta, config),
        imported=meta.imported,
        training=Training(
            data=config.data.with_fingerprint(meta.data_fingerprint),
            base=None if config.init_from is None else shown_url(str(config.init_from)),
        ),
    )
    saved = saved_state(target, meta, only_weights=True)
    shapes = shapes_of(description.shape, description.vocab_size)
    adapters = config.finetune.adapters
    stored = shapes if adapters is None else adapter_shapes(config.model, adapters)
    differing = saved.differences({(WEIGHT, name): prod(stored[name]) for name in stored})
    if differing:
        raise CheckpointCorruptError(
            f"the checkpoint {target} does not match the model of its config: {differing[0]} "
            f"({len(differing)} differ); use another one"
        )

    def read_trained(name: str) -> Tensor:
        weight = torch.empty(stored[name])
        saved.read(WEIGHT, name, 0, weight.view(-1))
        return weight

    read: Callable[[str], Tensor] = read_trained
    updates = None
    if adapters is not None:
        frozen = open_frozen(target, meta)
        require_shapes(target, frozen, shapes)
        factors = factors_of_matrices(config.model, adapters)
        updates = LowRankUpdates(adapters, frozen.tensor, read_trained)
        read = with_updates(factors, adapters.scale, frozen.tensor, read_trained)
    return WeightSource(description, _tokenizer_of(target, meta), shapes, read, updates)


def _branching_of(meta: CheckpointMeta, config: Config) -> Branching | None:
    point = meta.branch
    if point is None:
        return None
    trunk = WeightsIdentity(
        path=point.checkpoint, step=point.trunk_step, sha256=point.sha256, data=point.data
    )
    data = config.data.with_fingerprint(meta.data_fingerprint)
    return Branching(trunk=trunk, kept=point.kept, data=data)


def _tokenizer_of(target: Path, meta: CheckpointMeta) -> bytes:
    """Content of a checkpoint's tokenizer. Raises CheckpointCorruptError, TokenizerError."""
    try:
        found = find_tokenizer(target)
        content = read_tokenizer(path_within(target, found.name))
    except ValueError as error:
        raise CheckpointCorruptError(f"cannot read the checkpoint {target}: {error}") from None
    if hashlib.sha256(content).hexdigest() != meta.format.tokenizer_sha256:
        raise CheckpointCorruptError(
            f"the checkpoint {target} is damaged: {found.name} is not the file that was saved"
        )
    return content


def _from_folder(folder: Path, part: int, parts: int) -> WeightSource:
    description = read_description(folder)
    stored = open_weights(folder, description, part=part, parts=parts)
    stored.report_changed()
    if stored.changed:
        # All are of other weights.
        description = replace(description, val_loss=None, average=None, branch=None, training=None)
    shapes = shapes_of(description.shape, description.vocab_size)
    tokenizer = read_tokenizer(tokenizer_of(folder))
    return WeightSource(description, tokenizer, shapes, stored.read)
