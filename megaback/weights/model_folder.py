"""Model folders: weights in safetensors, a description in `config.json`, and the tokenizer.

`megaback convert` writes them (`--to full`, and `--to hf`, whose config.json is for transformers
and has a section of ours); inference and `init_from` read them. Nothing is pickled. config.json is
written last: a folder without it is not a model. Models that other programs have trained or merged
from such a folder are read too, and reported as changed.
"""

import hashlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from data_pipeline.common.atomic import replacing, write_text
from data_pipeline.common.checked_json import briefly, checked, read_json
from data_pipeline.common.limits import MAX_TOKENIZER_BYTES
from data_pipeline.common.number_ranges import CONTEXT, COUNT_OR_ZERO, VOCABULARY, Range
from data_pipeline.common.regular_files import UNFIT, read_file
from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    NotEnoughMemoryError,
    RunMismatchError,
    TokenizerError,
)
from data_pipeline.text.codec import Direction, TextCodec, TextFormat, Unit
from data_pipeline.text.tokenizer import (
    TOKENIZER_NAMES,
    file_name_of,
    find_tokenizer,
)
from megaback.checkpoints.safetensors_file import Spec
from megaback.config import ModelSection
from megaback.model.attention_choice import choose_attention
from megaback.model.gpt import ReverseGPT
from megaback.origins import Import
from megaback.planning.host_memory import host_memory_bytes
from megaback.run_folder import MODEL_CONFIG_NAME, refuse_unreadable_model
from megaback.weights.hf_config import from_stock, is_stock
from megaback.weights.identity import Average, Branching, Training
from megaback.weights.weight_files import StoredWeights, read_sums, write_weights
from megaback.weights.weight_names import require_exact, shapes_of

HF_TOKENIZER_NAME = "megaback.spm"
"""The SentencePiece model in a folder for transformers. With a name that ends with .model, stock
classes would load it as one that reads forward."""
HF_TOKENIZER_JSON_NAME = "megaback.bpe.json"
"""The byte-level BPE tokenizer in a folder for transformers, named otherwise for that reason."""
HF_TOKENIZER_NAMES = dict(
    zip(TOKENIZER_NAMES, (HF_TOKENIZER_NAME, HF_TOKENIZER_JSON_NAME), strict=True)
)
"""Name in a folder for transformers, by that in other folders."""
STOCK_SECTION = "megaback"
_LOG = logging.getLogger("megaback.weights")
_FORMAT_NAME = "megaback-model"
_FORMAT_VERSION = 3
_HASHES_IN_CONFIG_VERSION = 2
"""Version of folders whose config.json has the hashes of their weights."""
MAX_CONFIG_BYTES = 1 << 22


@dataclass(frozen=True, kw_only=True)
class ModelDescription:
    """Description of a model, without its weights."""

    shape: ModelSection
    vocab_size: int
    context_tokens: int
    text_format: TextFormat
    step: int
    val_loss: float | None
    is_foreign: bool = False
    """Whether it is a Llama or Qwen3 of another library, whose direction is not recorded."""
    on_examples: bool = False
    """Whether it was trained on instruction examples, as BackChat is."""
    average: Average | None = None
    """Origin of the weights, if they are the mean of others."""
    branch: Branching | None = None
    """Origin of the weights, or of the last ones of a mean, if they are a branch's."""
    imported: Import | None = None
    """Origin of the first weights, if another program has trained them."""
    training: Training | None = None
    """Data and base of the weights' run, or of that of the last ones of a mean."""

    def to_fields(self) -> dict[str, Any]:
        """Our fields of config.json."""
        return {
            "format": _FORMAT_NAME,
            "version": _FORMAT_VERSION,
            **self.text_format.to_dict(),
            "model": self.shape.model_dump(mode="json"),
            "vocab_size": self.vocab_size,
            "context_tokens": self.context_tokens,
            "step": self.step,
            "val_loss": self.val_loss if math.isfinite(self.val_loss or 0.0) else None,
            "on_examples": self.on_examples,
            **({} if self.average is None else {"average": asdict(self.average)}),
            **({} if self.branch is None else {"branch": asdict(self.branch)}),
            **({} if self.imported is None else {"imported": asdict(self.imported)}),
            **({} if self.training is None else {"training": asdict(self.training)}),
        }


def write_model_folder(
    folder: Path,
    description: ModelDescription,
    specs: Mapping[str, Spec],
    tensor_of: Callable[[str], Tensor],
    tokenizer: bytes,
    max_file_bytes: int,
) -> None:
    """Write a model folder tensor by tensor; the caller renames it to its final name."""
    write_weights(folder, specs, tensor_of, max_file_bytes)
    with replacing(folder / file_name_of(tokenizer)) as file:
        file.write(tokenizer)
    write_text(folder / MODEL_CONFIG_NAME, json.dumps(description.to_fields(), indent=2) + "\n")


def tokenizer_of(folder: Path) -> Path:
    """Path of a model folder's tokenizer. Raises TokenizerError."""
    for name in (*HF_TOKENIZER_NAMES.values(), *TOKENIZER_NAMES):
        if (folder / name).is_file():
            return folder / name
    others = " or ".join(HF_TOKENIZER_NAMES.values())
    raise TokenizerError(
        f"the model {folder} has no tokenizer ({' or '.join(TOKENIZER_NAMES)}, or for transformers "
        f"{others}); copy it from the folder that the model was made from"
    )


def read_tokenizer(path: Path) -> bytes:
    """Content of a tokenizer's file. Raises TokenizerError."""
    try:
        return read_file(path, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise TokenizerError(
            f"cannot read the tokenizer {path}: {error.strerror}; copy it from the folder that the "
            "model was made from"
        ) from None


def _config_fields(folder: Path) -> dict[str, Any]:
    path = folder / MODEL_CONFIG_NAME
    if not path.is_file():
        refuse_unreadable_model(folder)
        raise CheckpointMissingError(
            f"{folder} is not a model's folder (it has no {MODEL_CONFIG_NAME}); give one that "
            "`megaback convert` wrote"
        )
    try:
        fields = read_json(path, MAX_CONFIG_BYTES)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in UNFIT:
            raise
        raise _no_description(path, error) from None
    return fields


def _number(name: str, fields: Mapping[str, Any], allowed: Range) -> int:
    """An integer field of a config.json. Raises KeyError, ValueError."""
    number: int = checked(name, fields[name], int)
    if (problem := allowed.problem(number)) is not None:
        raise ValueError(f"{name} {briefly(number)} is {problem}")
    return number


def _no_description(path: Path, error: Exception) -> CheckpointCorruptError:
    reason = " ".join(str(error).split())
    return CheckpointCorruptError(
        f"{path} does not describe a model of this version ({reason}); convert it again"
    )


def _our_fields(folder: Path) -> dict[str, Any] | None:
    """Our fields of a folder's config.json; None for a model of another library."""
    fields = _config_fields(folder)
    ours = fields.get(STOCK_SECTION) if is_stock(fields) else fields
    return ours if isinstance(ours, dict) else None


def is_ours(folder: Path) -> bool:
    """Whether a folder's config.json is one that `megaback convert` wrote.

    Raises CheckpointMissingError, CheckpointCorruptError.
    """
    fields = _our_fields(folder)
    return fields is not None and fields.get("format") == _FORMAT_NAME


def read_description(folder: Path, direction: Direction | None = None) -> ModelDescription:
    """Description of a model folder, for use in one direction: by default backward, if the model
    has both.

    Raises CheckpointMissingError, CheckpointCorruptError, RunMismatchError for an unsupported
    model, and DirectionMismatchError for one that lacks the direction.
    """
    description = _read_description(folder)
    if direction is None:
        return description
    text_format = description.text_format.using(direction, f"the model {folder}")
    return replace(description, text_format=text_format)


def _read_description(folder: Path) -> ModelDescription:
    path = folder / MODEL_CONFIG_NAME
    fields = _our_fields(folder)
    if fields is None:
        return _describe_foreign(folder)
    try:
        known = (_HASHES_IN_CONFIG_VERSION, _FORMAT_VERSION)
        if fields["format"] != _FORMAT_NAME or fields["version"] not in known:
            raise ValueError("another format or version")
        description = ModelDescription(
            shape=ModelSection.model_validate(fields["model"]),
            vocab_size=_number("vocab_size", fields, VOCABULARY),
            context_tokens=_number("context_tokens", fields, CONTEXT),
            text_format=TextFormat.from_dict(fields),
            step=_number("step", fields, COUNT_OR_ZERO),
            val_loss=checked("val_loss", fields["val_loss"], float | None),
            on_examples=bool(fields.get("on_examples", False)),  # missing in earlier versions
            average=Average.of_field(fields.get("average")),
            branch=Branching.of_field(fields.get("branch")),
            imported=Import.of_field(fields.get("imported")),
            training=Training.of_field(fields.get("training")),
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _no_description(path, error) from None
    _require_agreement(description, _config_fields(folder), path)
    return description


def _require_agreement(description: ModelDescription, fields: dict[str, Any], path: Path) -> None:
    """Raises RunMismatchError if transformers would build another model from the config.json."""
    if not is_stock(fields):
        return
    ours = {"vocab_size": description.vocab_size, **description.shape.architecture()}
    shape = from_stock(fields, str(path))
    theirs = {"vocab_size": fields.get("vocab_size"), **shape.architecture()}
    for name, value in ours.items():
        if theirs[name] != value:
            raise RunMismatchError(
                f"{path} was changed: {name} is {theirs[name]} for transformers and {value} in its "
                f"section {STOCK_SECTION!r}; only models of unchanged shape are supported"
            )


def _describe_foreign(folder: Path) -> ModelDescription:
    """Description of another library's Llama or Qwen3 with a tokenizer that we can read."""
    fields = _config_fields(folder)
    shape = from_stock(fields, str(folder / MODEL_CONFIG_NAME))
    if any((folder / name).is_file() for name in HF_TOKENIZER_NAMES.values()):
        raise CheckpointCorruptError(
            f"{folder / MODEL_CONFIG_NAME} has lost its section {STOCK_SECTION!r}, without which "
            f"the model's direction is unknown; copy it from the {MODEL_CONFIG_NAME} of the folder "
            "that the model was made from"
        )
    try:
        tokenizer = read_file(path := find_tokenizer(folder), MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise TokenizerError(
            f"cannot read the tokenizer {path}: {error.strerror}; a model of another library needs "
            "its SentencePiece model, or its tokenizer.json"
        ) from None
    try:
        return ModelDescription(
            shape=shape,
            vocab_size=_number("vocab_size", fields, VOCABULARY),
            context_tokens=_number("max_position_embeddings", fields, CONTEXT),
            text_format=TextFormat(
                Direction.FORWARD, Unit.TOKEN, hashlib.sha256(tokenizer).hexdigest()
            ),
            step=0,
            val_loss=None,
            is_foreign=True,
        )
    except (ValueError, KeyError, TypeError) as error:
        raise _no_description(folder / MODEL_CONFIG_NAME, error) from None


def open_weights(
    folder: Path,
    description: ModelDescription,
    *,
    verify: bool = True,
    part: int = 0,
    parts: int = 1,
) -> StoredWeights:
    """Open the weights of a folder, and detect files that other programs have written.

    Their headers are compared with the description. Without `verify` nothing else is read; of
    several ranks, each verifies a part of the files. Raises
    CheckpointCorruptError for weights that are missing, truncated, altered or of another model.
    """
    stored = StoredWeights(folder)
    require_exact(folder, stored, description.shape, description.vocab_size)
    fields = _our_fields(folder)
    if fields is None:
        stored.changed = []  # they were never ours
        return stored
    sizes, sums = _files_in_config(folder, fields)
    sums |= read_sums(folder)
    if verify:
        stored.verify(sums, part, parts)
    else:
        stored.changed = [
            name for name in stored.changed if sizes.get(name) != (folder / name).stat().st_size
        ]
    return stored


def _files_in_config(
    folder: Path, fields: Mapping[str, Any]
) -> tuple[dict[str, int], dict[str, str]]:
    """Sizes in bytes and SHA-256 of weight files, in the format of earlier versions."""
    try:
        files = dict(fields.get("files", {}))
        sizes = {name: int(size) for name, (size, _) in files.items()}
        return sizes, {name: str(sha256) for name, (_, sha256) in files.items()}
    except (ValueError, TypeError) as error:
        raise _no_description(folder / MODEL_CONFIG_NAME, error) from None


def load_model_folder(
    folder: Path,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
    direction: Direction | None = None,
) -> tuple[ReverseGPT, ModelDescription, TextCodec]:
    """Load a model, its description and its text codec.

    `direction`: as `read_description` takes it.
    """
    description = read_description(folder, direction)
    text_format = description.text_format
    tokenizer = tokenizer_of(folder)
    codec = TextCodec.load_as(tokenizer, text_format)
    text_format.require_same(codec.format, f"the model {folder}", str(tokenizer))
    if codec.vocab_size != description.vocab_size:
        raise RunMismatchError(
            f"{folder} has a vocabulary of {description.vocab_size} and a tokenizer of "
            f"{codec.vocab_size} pieces; use the tokenizer that the model was trained with"
        )
    stored = open_weights(folder, description)
    stored.report_changed()
    model = empty_model(folder, description, device, dtype)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.copy_(stored.read(name))
            if not weight.isfinite().all():
                raise CheckpointCorruptError(
                    f"{name:.200} in {folder} has non-finite values in "
                    f"{str(dtype).removeprefix('torch.')}; use an earlier checkpoint of the run, "
                    "or fp32"
                )
    return model, description, codec


def empty_model(
    folder: Path, description: ModelDescription, device: torch.device, dtype: torch.dtype
) -> ReverseGPT:
    """A model for inference whose weights are not set yet. Raises NotEnoughMemoryError."""
    if device.type == "cpu":
        _require_memory(folder, description, dtype)
    attention = choose_attention("auto", device, dtype, description.shape.head_size)
    _LOG.debug("loading %s to %s as %s, attention by %s", folder, device, dtype, attention.name)
    with torch.device("meta"):
        model = ReverseGPT(description.shape, description.vocab_size, attention.backend)
    model.to(dtype).to_empty(device=device)
    if description.shape.tie_embeddings:  # `to_empty` has untied them
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.eval()


def _require_memory(folder: Path, description: ModelDescription, dtype: torch.dtype) -> None:
    """Raise NotEnoughMemoryError if weights and one full context exceed this machine's memory."""
    shape = description.shape
    numbers = sum(map(prod, shapes_of(shape, description.vocab_size).values()))
    # For each position, rotary cosines and sines, and keys and values of all layers.
    position_bytes = 4 * (2 * shape.head_size + 2 * shape.num_layers * shape.kv_width)
    needed = numbers * dtype.itemsize + description.context_tokens * position_bytes
    there = host_memory_bytes()
    if needed > there:
        raise NotEnoughMemoryError(
            f"the model {folder} needs {needed / 1e9:,.1f} GB for {numbers:,} weights and a "
            f"context of {description.context_tokens:,} tokens, but this machine has "
            f"{there / 1e9:,.1f} GB; use one with more memory, or a smaller model"
        )
