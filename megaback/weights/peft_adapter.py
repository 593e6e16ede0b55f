"""LoRA adapters in PEFT's format: `adapter_config.json` and `adapter_model.safetensors`.

An adapter is merged with its base, in fp32. What changes a model in another way than adding
alpha / rank (or alpha / sqrt(rank)) x B A to its matrices is refused by name. Nothing is pickled.
"""

from collections.abc import Mapping
from dataclasses import replace
from math import isfinite, sqrt
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import briefly, checked, read_json
from data_pipeline.errors import CheckpointCorruptError, RunMismatchError
from megaback.checkpoints.safetensors_file import TensorFile
from megaback.model.lora import with_updates
from megaback.origins import WeightsIdentity
from megaback.run_folder import ADAPTER_NAME, ADAPTER_WEIGHTS_NAME
from megaback.weights.source import WeightSource

BASE_SHA256 = "megaback_base_sha256"
"""Metadata of the weights: hash of the base's list of hashes, as in a `WeightsIdentity`."""
_PREFIX, _SUFFIXES = "base_model.model.", (".lora_A.weight", ".lora_B.weight")
_READ = {"peft_type", "r", "lora_alpha", "use_rslora", "bias", "init_lora_weights"}
# Of these, the names of the tensors say all, or they are for training and loading only.
_WITHOUT_EFFECT = {
    *("task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "target_modules", "exclude_modules", "lora_dropout", "layers_pattern"),
    *("layers_to_transform", "eva_config", "megatron_core", "qalora_group_size", "runtime_config"),
}
_INITIAL_WEIGHTS = (True, False, "gaussian", "orthogonal", "eva")
"""Kinds of initial weights that leave the base as it is."""


def stored_name(factor: str) -> str:
    """Name in PEFT's files of a factor, which is named as in a model with adapters."""
    return _PREFIX + factor.replace(".default.", ".")


def merged_with(folder: Path, base: WeightSource, identity: WeightsIdentity) -> WeightSource:
    """The model of an adapter's folder and its base.

    Raises CheckpointCorruptError for damaged files, RunMismatchError for another base and for
    adapters of other kinds.
    """
    scale, rank = _scale_of(folder)
    if not (folder / ADAPTER_WEIGHTS_NAME).is_file():
        raise CheckpointCorruptError(
            f"{folder} has no {ADAPTER_WEIGHTS_NAME}; save the adapter with peft's "
            "`save_pretrained`, which writes safetensors by default"
        )
    weights = TensorFile(folder / ADAPTER_WEIGHTS_NAME)
    recorded = weights.metadata.get(BASE_SHA256)
    if recorded is not None and identity.sha256 != recorded:
        raise RunMismatchError(
            f"the base {identity.path} (SHA-256 {str(identity.sha256)[:12]}) is not that of the "
            f"adapter {folder} ({recorded[:12]}); give the folder that it was made for"
        )
    factors = _factors(folder, weights, base.shapes, rank)
    for names in factors.values():
        for name in names:
            if not weights.tensor(name).isfinite().all():
                raise CheckpointCorruptError(
                    f"{name} in {weights.path} has non-finite values; use an earlier adapter"
                )
    description = replace(base.description, val_loss=None, average=None, branch=None, training=None)
    read = with_updates(factors, scale, base.read, weights.tensor)
    return WeightSource(description, base.tokenizer, base.shapes, read)


def _scale_of(folder: Path) -> tuple[float, int]:
    """Factor of the updates, and their rank."""
    path = folder / ADAPTER_NAME
    try:
        fields = read_json(path)
        if not isinstance(fields, dict):
            raise ValueError(f"{briefly(fields)} is not an object")
        rank, alpha = fields.get("r"), fields.get("lora_alpha")
        rank, alpha = checked("r", rank, int), checked("lora_alpha", alpha, float)
        if rank < 1 or not isfinite(alpha):
            raise ValueError(f"r is {rank}, and lora_alpha {alpha}")
    except ValueError as error:
        raise CheckpointCorruptError(
            f"cannot read {path}: {error}; save the adapter again"
        ) from None
    for key, value in fields.items():
        if not _is_plain(key, value):
            raise RunMismatchError(
                f"{path} has {briefly(key)}: {briefly(value)}, and only plain LoRA is merged here; "
                "merge it in peft (`merge_and_unload()`, `save_pretrained(DIR)`), save its "
                "tokenizer to DIR too, and give that folder"
            )
    return alpha / (sqrt(rank) if fields.get("use_rslora") else rank), rank


def _is_plain(key: str, value: Any) -> bool:
    """Whether a field leaves an adapter one of LoRA alone. Unknown fields do if they are empty."""
    if key == "peft_type":
        return bool(value == "LORA")
    if key == "bias":
        return bool(value == "none")
    if key == "init_lora_weights":
        return value in _INITIAL_WEIGHTS
    return key in _READ | _WITHOUT_EFFECT or not value


def _factors(
    folder: Path, weights: TensorFile, shapes: Mapping[str, tuple[int, ...]], rank: int
) -> dict[str, tuple[str, str]]:
    """Names of both factors by the name of their matrix."""
    found: dict[str, tuple[str, str]] = {}
    for name in weights.entries:
        suffix = next((one for one in _SUFFIXES if name.endswith(one)), None)
        module = name.removeprefix(_PREFIX).removesuffix(suffix or "")
        matrix = f"{module}.weight"
        if suffix is None or not name.startswith(_PREFIX) or len(shapes.get(matrix, ())) != 2:
            raise RunMismatchError(
                f"{name[:100]!r} in {weights.path} is no factor of a matrix of the base; give the "
                "base that the adapter was trained on, or merge it in peft (`merge_and_unload()`)"
            )
        found[matrix] = (f"{_PREFIX}{module}{_SUFFIXES[0]}", f"{_PREFIX}{module}{_SUFFIXES[1]}")
    if not found:
        raise CheckpointCorruptError(f"{weights.path} has no factors; save the adapter again")
    for matrix, names in found.items():
        rows, columns = shapes[matrix]
        for name, size in zip(names, ((rank, columns), (rows, rank)), strict=True):
            entry = weights.entries.get(name)
            if entry is None or entry.shape != size:
                has = "is missing" if entry is None else f"has the shape {list(entry.shape)}"
                raise RunMismatchError(
                    f"{name} in {weights.path} {has}, and {list(size)} is expected of rank {rank} "
                    f"and the base; give the base that the adapter {folder} was trained on"
                )
    return found
