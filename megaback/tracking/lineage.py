"""Lineage of a run's weights: its base, the checkpoint that it resumed from, its starts."""

from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import read_json
from megaback.checkpoints.safetensors_file import size_and_hash
from megaback.config import Config
from megaback.faults.exit_record import read_history
from megaback.run_folder import (
    CHECKPOINTS_FOLDER,
    META_NAME,
    MODEL_CONFIG_NAME,
    checkpoints_meant_by,
    step_name,
)


def lineage(config: Config, start_step: int) -> dict[str, Any]:
    """`base`, `checkpoint` (None if there is none), `restarts` and `starts` of a run.

    `sha256` of a checkpoint is the hash of its meta.json, that of a model folder the hash of its
    config.json; both contain the hashes of all other files.
    """
    started = [line for line in read_history(config.run) if line.get("event") == "start"]
    checkpoint = config.run / CHECKPOINTS_FOLDER / step_name(start_step)
    return {
        "base": None if config.init_from is None else _identity(_meant_by(config.init_from)),
        "checkpoint": _identity(checkpoint / META_NAME) if start_step else None,
        "restarts": max(len(started) - 1, 0),
        "starts": [{key: line.get(key) for key in ("step", "time")} for line in started],
    }


def _meant_by(base: Path) -> Path:
    """The file that describes the model, checkpoint or run of `init_from`."""
    if (base / MODEL_CONFIG_NAME).is_file():
        return base / MODEL_CONFIG_NAME
    return max(checkpoints_meant_by(base), default=base) / META_NAME


def _identity(description: Path) -> dict[str, Any]:
    """Identity of the artifact that a file describes; None for unknown fields."""
    identity: dict[str, Any] = {"path": str(description.parent), "step": None, "sha256": None}
    try:
        identity["step"] = read_json(description).get("step")
        identity["sha256"] = size_and_hash(description)[1]
    except (OSError, ValueError, AttributeError):
        pass
    return identity
