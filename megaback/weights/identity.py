"""Identity of weights: their folder, step and hash; and the origin of a mean of several."""

import hashlib
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import made_from, read_json, require_sha256
from data_pipeline.errors import CheckpointCorruptError
from megaback.checkpoints.safetensors_file import size_and_hash
from megaback.config_data import DataSection
from megaback.origins import WeightsIdentity
from megaback.run_folder import META_NAME, MODEL_CONFIG_NAME, SUMS_NAME, checkpoints_meant_by
from megaback.weights.weight_files import StoredWeights, text_of_sums


@dataclass(frozen=True, kw_only=True)
class Average:
    """Origin of weights that are the mean of others."""

    sources: tuple[WeightsIdentity, ...]
    last_val_loss: float | None = None
    """Val loss of the last source, measured with that of the mean, in nats per token."""

    @classmethod
    def of_field(cls, value: object) -> "Average | None":
        """From a field of a config.json. Raises ValueError, TypeError."""
        if value is None:
            return None
        average = made_from(cls, value)
        for source in average.sources:
            if source.sha256 is not None:
                require_sha256("sha256 of a source", source.sha256)
        return average


@dataclass(frozen=True, kw_only=True)
class Branching:
    """Origin of a branch's weights: what it continues, and on which data."""

    trunk: WeightsIdentity
    kept: tuple[str, ...]
    data: str
    """The branch's own data sets and their fingerprint."""

    @property
    def shown(self) -> str:
        """Checkpoint, step and what is kept, as of a `BranchPoint`."""
        return f"{self.trunk.path} (step {self.trunk.step}; keeps {', '.join(self.kept)})"

    @classmethod
    def of_field(cls, value: object) -> "Branching | None":
        """From a field of a config.json. Raises ValueError, TypeError."""
        if value is None:
            return None
        branching = made_from(cls, value)
        if branching.trunk.sha256 is not None:
            require_sha256("sha256 of a trunk", branching.trunk.sha256)
        return branching


@dataclass(frozen=True, kw_only=True)
class Training:
    """Data and initial weights of the run that weights are from."""

    data: str
    """Data sets and their fingerprint."""
    base: str | None = None
    """Path or URL of the initial weights (`init_from`), if they were not random."""
    val_bits_per_byte: float | None = None
    """Val loss in bits per byte, from the run's metrics."""

    @classmethod
    def of_field(cls, value: object) -> "Training | None":
        """From a field of a config.json. Raises ValueError, TypeError."""
        return None if value is None else made_from(cls, value)


def description_of(path: Path) -> Path:
    """The file that describes a model folder, a checkpoint, or a run's newest checkpoint."""
    if (path / MODEL_CONFIG_NAME).is_file():
        return path / MODEL_CONFIG_NAME
    return max(checkpoints_meant_by(path), default=path) / META_NAME


def identity_of(description: Path) -> WeightsIdentity:
    """Identity of the weights that a file describes."""
    folder = str(description.parent)
    try:
        fields = read_json(description)
        step, sha256 = fields.get("step"), _hash_of(description)
        return WeightsIdentity(path=folder, step=step, sha256=sha256, data=_data_of(fields))
    except (OSError, ValueError, AttributeError):
        return WeightsIdentity(path=folder)


def _hash_of(description: Path) -> str:
    """Hash of the file that lists the weights' hashes. Raises OSError.

    Weights that another program has written are read, for the list that they would have.
    """
    folder = description.parent
    with suppress(CheckpointCorruptError):
        if description.name == MODEL_CONFIG_NAME and (stored := StoredWeights(folder)).changed:
            sums = {name: size_and_hash(folder / name)[1] for name in stored.names}
            return hashlib.sha256(text_of_sums(sums).encode()).hexdigest()
    sums_path = folder / SUMS_NAME
    return size_and_hash(sums_path if sums_path.is_file() else description)[1]


def _data_of(fields: dict[str, Any]) -> str | None:
    """Data sets in the fields of a meta.json; None for a model folder."""
    try:
        data = DataSection.model_validate(fields["config"]["data"])
        return data.with_fingerprint(str(fields["data_fingerprint"]))
    except (KeyError, TypeError, ValueError):
        return None
