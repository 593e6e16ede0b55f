"""Model shape of a run's base (`init_from` or `branch_from`), which a config need not repeat.

Keys missing from a config's `model` are the base's; others must equal the base's. Loads no torch.
"""

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from data_pipeline.common.checked_json import parse_json, read_json
from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError, RunMismatchError
from data_pipeline.redaction import shown_url
from megaback.config import ModelSection
from megaback.config_data import parse_base
from megaback.copy_location import find_base_copy
from megaback.faults.run_ownership import config_of_run
from megaback.run_folder import META_NAME, MODEL_CONFIG_NAME, checkpoints_meant_by
from megaback.weights.hf_config import from_stock, is_stock
from megaback.yaml_text import read_yaml_file

_STOCK_SECTION = "megaback"
"""Equal to `model_folder.STOCK_SECTION`, whose module loads torch."""

ARCHITECTURE = {
    name
    for name in ModelSection.model_fields
    if name not in ("zero_output_projections", "zero_head", "base_width")
}
"""Keys of `model` that a base determines; the others concern initialization and learning rates."""
_REQUIRED = {name for name, field in ModelSection.model_fields.items() if field.is_required()}


def with_base_shape(fields: dict[str, Any]) -> dict[str, Any]:
    """A config's fields, with missing keys of `model` taken from its base, if it has one.

    A complete config is returned unchanged, without reading the base. Raises RunMismatchError for
    keys that contradict the base, CheckpointMissingError if it is needed and missing, and
    CheckpointCorruptError.
    """
    key = "init_from" if fields.get("init_from") is not None else "branch_from"
    base, given = fields.get(key), fields.get("model") or {}
    if not isinstance(base, str | Path) or not isinstance(given, dict):
        return fields
    given = {key: value for key, value in given.items() if value is not None}
    if given.keys() >= ARCHITECTURE:
        return fields
    base, run = parse_base(base), fields.get("run")
    if isinstance(base, str):  # a run that has begun needs it no longer
        shape = _shape_of_run(run) or _shape_of_copy(base)
        base = shown_url(base)
    else:
        shape = base_shape(base) or _shape_of_run(run)
    if shape is None:
        if given.keys() >= _REQUIRED:
            return fields  # training itself reports the missing base
        raise CheckpointMissingError(
            f"{key} {base} is not a model, run or checkpoint, and the config has no model of "
            f"its own; correct {key}, or set model.num_layers, width and num_heads"
        )
    theirs = shape.architecture()
    differing = [key for key in theirs if key in given and not _is_same(given[key], theirs[key])]
    if differing:
        first = differing[0]
        others = f" ({len(differing)} differ: {', '.join(differing)})" if differing[1:] else ""
        raise RunMismatchError(
            f"{key} {base} has another shape than the config's model: {first} is {theirs[first]} "
            f"there and {given[first]} here{others}; remove the key to use the base's value"
        )
    return fields | {"model": theirs | given}


def base_shape(base: Path) -> ModelSection | None:
    """Model shape of a converted folder, a run or a checkpoint; None if the path is none of these.

    Raises CheckpointCorruptError, and RunMismatchError for an unsupported model.
    """
    path = base / MODEL_CONFIG_NAME
    if path.is_file():
        fields = _read(path)
        ours = fields.get(_STOCK_SECTION) if is_stock(fields) else fields
        return from_stock(fields, str(path)) if ours is None else _shape(path, ours)
    found = checkpoints_meant_by(base)
    if not found:
        return None
    path = found[-1] / META_NAME
    return _shape(path, _read(path).get("config"))


def _shape_of_copy(address: str) -> ModelSection | None:
    """Model shape of a checkpoint's copy; None if the address has none."""
    found = find_base_copy(address)
    if found is None:
        return None
    copy, text = found
    try:
        return _shape(copy.name, parse_json(text).get("config"))
    except (ValueError, AttributeError) as error:
        raise _damaged(copy.name, error) from None


def _shape_of_run(run: Any) -> ModelSection | None:
    """Model shape of a run that has begun, from its folder."""
    path = config_of_run(Path(str(run)))
    try:
        return _shape(path, read_yaml_file(path))
    except (OSError, yaml.YAMLError, CheckpointCorruptError):
        return None


def _read(path: Path) -> dict[str, Any]:
    try:
        fields = read_json(path)
        if not isinstance(fields, dict):
            raise ValueError("not an object")
    except (OSError, ValueError) as error:
        raise _damaged(path, error) from None
    return fields


def _shape(path: Path | str, fields: Any) -> ModelSection:
    try:
        return ModelSection.model_validate(fields["model"])
    except (KeyError, TypeError, ValidationError) as error:
        raise _damaged(path, error) from None


def _damaged(path: Path | str, error: Exception) -> CheckpointCorruptError:
    reason = " ".join(str(error).split())
    return CheckpointCorruptError(f"{path} does not describe a model ({reason})")


def _is_same(given: Any, theirs: Any) -> bool:
    if isinstance(theirs, bool) or isinstance(given, bool):
        return given is theirs
    try:
        return float(given) == float(theirs)  # YAML takes 1e4 for text
    except (TypeError, ValueError):
        return False
