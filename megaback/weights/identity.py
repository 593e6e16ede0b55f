"""Identity of weights: where they are, of which step, and the hash of what describes them."""

from dataclasses import dataclass
from pathlib import Path

from data_pipeline.common.checked_json import read_json
from megaback.checkpoints.safetensors_file import size_and_hash
from megaback.run_folder import META_NAME, MODEL_CONFIG_NAME, SUMS_NAME, checkpoints_meant_by


@dataclass(frozen=True, kw_only=True)
class WeightsIdentity:
    """Identity of a checkpoint or a model folder; None for unknown values."""

    path: str
    step: int | None = None
    sha256: str | None = None
    """Hash of the file that lists the hashes of the weights: a checkpoint's meta.json, a model
    folder's SHA256SUMS or, in earlier versions and models of others, its config.json."""


def description_of(path: Path) -> Path:
    """The file that describes a model folder, a checkpoint, or a run's newest checkpoint."""
    if (path / MODEL_CONFIG_NAME).is_file():
        return path / MODEL_CONFIG_NAME
    return max(checkpoints_meant_by(path), default=path) / META_NAME


def identity_of(description: Path) -> WeightsIdentity:
    """Identity of the weights that a file describes."""
    folder, sums = str(description.parent), description.with_name(SUMS_NAME)
    try:
        step = read_json(description).get("step")
        hashed = sums if sums.is_file() else description
        return WeightsIdentity(path=folder, step=step, sha256=size_and_hash(hashed)[1])
    except (OSError, ValueError, AttributeError):
        return WeightsIdentity(path=folder)
