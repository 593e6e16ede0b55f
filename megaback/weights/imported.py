"""Models of other programs as weights of ours: checkpoints of transformers and of DeepSpeed.

A checkpoint is read one tensor at a time, and nothing in it is executed. What megaback does not
have is refused by name. The tokenizer gets the markers that it lacks, and the embeddings rows for
those that do not fit. Else the weights are not changed: those of a model that reads forward are a
starting point for training one that writes backward.
"""

import hashlib
import re
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import yaml
from torch import Tensor

from data_pipeline.common.checked_json import briefly, checked, read_json
from data_pipeline.common.limits import MAX_TOKENIZER_BYTES
from data_pipeline.common.number_ranges import CONTEXT, VOCABULARY
from data_pipeline.common.regular_files import read_file
from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    RunMismatchError,
    TokenizerError,
)
from data_pipeline.storage.hub_models import HubModel, fetch_model
from data_pipeline.text.codec import Directions, TextFormat, Unit
from data_pipeline.text.tokenizer import TOKENIZER_NAMES
from data_pipeline.tokenizer.markers import MarkedTokenizer, with_markers
from megaback.checkpoints.safetensors_file import Spec
from megaback.origins import Import, WeightsIdentity
from megaback.run_folder import INDEX_NAME, MODEL_CONFIG_NAME, WEIGHTS_NAME
from megaback.weights.deepspeed_checkpoint import DeepSpeedWeights
from megaback.weights.deepspeed_files import checkpoint_folder, is_deepspeed
from megaback.weights.hf_config import from_stock
from megaback.weights.identity import identity_of
from megaback.weights.model_folder import MAX_CONFIG_BYTES, STOCK_SECTION, ModelDescription
from megaback.weights.source import WeightSource
from megaback.weights.weight_files import StoredWeights
from megaback.weights.weight_names import (
    EMBEDDING_NAME,
    HEAD_NAME,
    NamedWeights,
    require_exact,
    shapes_of,
)

_TOKENIZER_NAMES = tuple(reversed(TOKENIZER_NAMES))
"""tokenizer.json comes first, as the one that transformers uses."""
CARD_NAME = "README.md"
_MAX_CARD_BYTES = 1 << 20
_CARD_FIELDS = re.compile(r"---\n(.*?)\n---\n", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
DESCRIPTION_FILES = (MODEL_CONFIG_NAME, *TOKENIZER_NAMES, CARD_NAME)
"""Files of a model on the hub that are read before its weights."""
_WEIGHT_FILES = (WEIGHTS_NAME, INDEX_NAME, "model-*-of-*.safetensors")
_OF_PIECES = (EMBEDDING_NAME, HEAD_NAME)
_ROWS_AT_ONCE = 4096


class _Weights(NamedWeights, Protocol):
    def dtype(self, name: str) -> torch.dtype: ...


@dataclass(frozen=True)
class ImportedModel:
    """A model of another program, and the specs of its tensors in the types of its files."""

    source: WeightSource
    specs: dict[str, Spec]
    marked: MarkedTokenizer
    """Tokenizer with our markers, and its differences from the other program's."""


def open_import(
    path: Path,
    directions: Directions,
    *,
    config: Path | None = None,
    tokenizer: Path | None = None,
    context_tokens: int | None = None,
    hub: HubModel | None = None,
) -> ImportedModel:
    """Open a checkpoint of transformers (a folder of save_pretrained), or of DeepSpeed.

    `config` and `tokenizer`: files, by default those beside the weights. `context_tokens`: by
    default, and at most, the config's max_position_embeddings. `hub`: the model on the hub whose
    `DESCRIPTION_FILES` are in the folder; its weights are fetched once those are found to be
    supported. Raises CheckpointMissingError, CheckpointCorruptError, RunMismatchError,
    TokenizerError and, of the hub, SourceMissingError and SourceUnreadableError.
    """
    if not path.exists():
        raise CheckpointMissingError(
            f"{path} does not exist; give a folder of save_pretrained, or a checkpoint of DeepSpeed"
        )
    config_path = _beside(path, config, (MODEL_CONFIG_NAME,))
    if config_path is None:
        raise CheckpointMissingError(
            f"{path} has no {MODEL_CONFIG_NAME}; give the one of its transformers model with "
            "`config`"
        )
    fields = _fields(config_path)
    shape = from_stock(fields, str(config_path))
    num_rows = _number(fields, "vocab_size", VOCABULARY.problem, config_path)
    max_context = _number(fields, "max_position_embeddings", CONTEXT.problem, config_path)
    if context_tokens is not None and context_tokens > max_context:
        raise RunMismatchError(
            f"`context_tokens` is {context_tokens:,}, and max_position_embeddings of {config_path} "
            f"is {max_context:,}; give at most that"
        )

    def open_weights() -> tuple[_Weights, str, WeightsIdentity]:
        opened = _weights_of(path, config_path)
        require_exact(path, opened[0], shape, num_rows)
        return opened

    of_folder = open_weights() if hub is None else None
    content = _tokenizer_of(path, tokenizer)
    text_format = TextFormat.from_dict(
        {"direction": directions.value, "unit": Unit.TOKEN.value, "tokenizer_sha256": ""}
    )
    try:
        marked = with_markers(content, num_rows)
    except TokenizerError as error:
        raise TokenizerError(f"the tokenizer of {path}: {error}") from None
    if hub is not None:
        fetch_model(hub.address, _WEIGHT_FILES)
    weights, kind, base = of_folder or open_weights()
    if hub is not None:
        base = replace(base, path=hub.address)
    text_format = replace(text_format, tokenizer_sha256=hashlib.sha256(marked.content).hexdigest())
    vocab_size = marked.vocab_size
    description = ModelDescription(
        shape=shape.resolved(),
        vocab_size=vocab_size,
        context_tokens=context_tokens or max_context,
        text_format=text_format,
        step=base.step or 0,
        val_loss=None,
        imported=Import(
            base=base,
            kind=kind,
            added_rows=vocab_size - num_rows,
            base_on_hub=_base_on_hub(fields, config_path.with_name(CARD_NAME)),
        ),
    )
    shapes = shapes_of(shape, vocab_size)

    def read(name: str) -> Tensor:
        weight = weights.read(name)
        if not weight.to(_stored(weight.dtype)).isfinite().all():
            raise CheckpointCorruptError(
                f"{name:.200} of {path} has non-finite values; import an earlier checkpoint of "
                "that model"
            )
        return with_mean_rows(weight, shapes[name][0]) if name in _OF_PIECES else weight

    source = WeightSource(description, marked.content, shapes, read)
    specs: dict[str, Spec] = {
        name: (_stored(weights.dtype(name)), size) for name, size in shapes.items()
    }
    return ImportedModel(source, specs, marked)


def with_mean_rows(weight_VD: Tensor, num_rows: int) -> Tensor:
    """A matrix with more rows: each new one is the mean of the given ones.

    A marker without training thus begins as a piece like any other (Hewitt, "Initializing new word
    embeddings for pretrained language models", 2021), without its noise. The mean is computed in
    fp64, by one thread, so that it is the same everywhere.
    """
    given = len(weight_VD)
    if num_rows == given:
        return weight_VD
    total_D = np.zeros(weight_VD.shape[1])
    for part_VD in torch.split(weight_VD, _ROWS_AT_ONCE):
        total_D += part_VD.double().numpy().sum(axis=0)
    mean_D = torch.from_numpy(total_D / given).to(weight_VD.dtype)
    return torch.cat([weight_VD, mean_D.expand(num_rows - given, -1)])


def _beside(path: Path, given: Path | None, names: tuple[str, ...]) -> Path | None:
    """A given file or one of these names in a given folder; else in a checkpoint's folder or the
    one above it, where transformers' Trainer has them."""
    folders = [path, path.absolute().parent] if given is None else [given]
    if given is not None and given.is_file():
        return given
    found = (folder / name for folder in folders for name in names if (folder / name).is_file())
    return next(found, None)


def _fields(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path, MAX_CONFIG_BYTES)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise RunMismatchError(
            f"{path} is not a config of transformers ({error}); give the one that was saved with "
            "the weights"
        ) from None
    if STOCK_SECTION in fields or "tokenizer_sha256" in fields:
        raise RunMismatchError(
            f"{path} is of a model that megaback has written; it is read as it is: use "
            "`megaback convert` for another format"
        )
    return fields


def _base_on_hub(fields: dict[str, Any], card: Path) -> str | None:
    """Name of the base in a card's `base_model`, or in a config's `_name_or_path`, if it has the
    form of one on the hub."""
    names = [fields.get("_name_or_path")]
    with suppress(OSError, ValueError, RecursionError, yaml.YAMLError):
        found = _CARD_FIELDS.match(read_file(card, _MAX_CARD_BYTES).decode())
        stated = yaml.safe_load(found[1]) if found else None
        base = stated.get("base_model") if isinstance(stated, dict) else None
        names = [*(base if isinstance(base, list) and len(base) == 1 else [base]), *names]
    of_hub = (name for name in names if isinstance(name, str) and _HUB_NAME.fullmatch(name))
    return next((name for name in of_hub if not Path(name).exists()), None)


def _number(fields: dict[str, Any], name: str, problem_of: Any, path: Path) -> int:
    try:
        number: int = checked(name, fields[name], int)
        if (problem := problem_of(number)) is not None:
            raise ValueError(f"{name} {briefly(number)} is {problem}")
    except (KeyError, ValueError) as error:
        raise RunMismatchError(
            f"{path} does not describe a supported model: {' '.join(str(error).split())}"
        ) from None
    return number


def _weights_of(path: Path, config_path: Path) -> tuple[_Weights, str, WeightsIdentity]:
    """Reader of the weights, their format, and what they are."""
    if any((path / name).is_file() for name in (WEIGHTS_NAME, INDEX_NAME)):
        return StoredWeights(path), "transformers", identity_of(config_path)
    if is_deepspeed(path):
        folder = checkpoint_folder(path)
        weights = DeepSpeedWeights(folder)
        return weights, weights.kind, WeightsIdentity(path=str(folder), step=weights.step)
    if pickled := sorted(path.glob("*.bin")) + sorted(path.glob("*.pt")):
        raise CheckpointMissingError(
            f"the weights of {path} are in {pickled[0].name}, a pickle, which is not loaded since "
            "it could run code; where you trust it, load it in transformers and save it as "
            "safetensors: `AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(OTHER)`"
        )
    raise CheckpointMissingError(
        f"{path} has no weights of transformers ({WEIGHTS_NAME} or {INDEX_NAME}) or of DeepSpeed "
        "(*_model_states.pt); give the folder that contains them"
    )


def _tokenizer_of(path: Path, given: Path | None) -> bytes:
    found = _beside(path, given, _TOKENIZER_NAMES)
    if found is None:
        raise TokenizerError(
            f"there is no {' or '.join(_TOKENIZER_NAMES)} in {given or path}; give the tokenizer "
            "that the model was trained with as `tokenizer`"
        )
    try:
        return read_file(found, MAX_TOKENIZER_BYTES)
    except OSError as error:
        raise TokenizerError(
            f"cannot read the tokenizer {found}: {error.strerror}; give another copy"
        ) from None


def _stored(dtype: torch.dtype) -> torch.dtype:
    """Type in which a tensor is stored: bf16 stays, fp16 is exact in fp32."""
    return dtype if dtype == torch.bfloat16 else torch.float32
