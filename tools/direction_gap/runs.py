"""Pairs of runs that differ in direction only: their configs, checkpoints and models."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from data_pipeline.errors import (
    CheckpointCorruptError,
    ConfigError,
    DirectionMismatchError,
    RunMismatchError,
    ShardsMissingError,
    SourceEmptyError,
)
from data_pipeline.text.codec import Direction
from megaback.config import Config
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.run_folder import META_NAME

if TYPE_CHECKING:
    import torch

    from megaback.checkpoints.checkpoint import CheckpointMeta
    from megaback.model.gpt import ReverseGPT

TRAINED_SECTIONS = ("model", "batch", "optimizer", "training")
DIRECTIONS = (Direction.FORWARD, Direction.BACKWARD)


@dataclass(frozen=True)
class ArrowRun:
    """One run of a pair."""

    seed: int
    direction: Direction
    folder: Path

    @property
    def overrides(self) -> tuple[str, ...]:
        """Overrides of the config for this run."""
        return (
            f"run={self.folder}",
            f"training.seed={self.seed}",
            f"data.direction={self.direction.value}",
            "data.forward_share=null",  # settings of models of both directions
            "validation.direction=null",
        )


def runs_of(config: Config, num_seeds: int) -> list[ArrowRun]:
    """A forward and a backward run per seed, counted from the config's."""
    first = config.training.seed
    return runs_of_seeds(config, range(first, first + num_seeds))


def runs_of_seeds(config: Config, seeds: Iterable[int]) -> list[ArrowRun]:
    """A forward and a backward run for each seed."""
    return [
        ArrowRun(seed, direction, config.run / f"seed-{seed}" / direction.value)
        for seed in sorted(seeds)
        for direction in DIRECTIONS
    ]


def train_all(
    config: Path,
    overrides: tuple[str, ...],
    runs: Sequence[ArrowRun],
    save_before: str | None,
    hostfile: Path | None,
) -> None:
    """Train or resume each run to its end. Exits with the code of a run that fails."""
    from launcher.train import train

    for run in runs:
        click.echo(f"seed {run.seed}, {run.direction.value}: {run.folder}")
        code = train(config, (*overrides, *run.overrides), save_before, hostfile)
        if code:
            raise SystemExit(code)


def require_comparable(config: Path, overrides: tuple[str, ...], runs: list[ArrowRun]) -> None:
    """Check that both directions can be trained on these shards, for the same number of steps.

    Raises ConfigError, DirectionMismatchError, ShardsMissingError, SourceEmptyError, and the errors
    of `open_data`.
    """
    for run in runs[: len(DIRECTIONS)]:
        settings = load_config(config, (*overrides, *run.overrides))
        for key in ("init_from", "branch_from"):
            if getattr(settings, key) is not None:
                raise ConfigError(
                    f"{key} is {getattr(settings, key)}, a model trained in one direction; unset "
                    "it, so that both directions start from the same weights"
                )
        if settings.optimizer.decay_at is not None:
            raise ConfigError(
                "optimizer.decay_at makes several models of one run; unset it and set "
                "training.steps, so that one model of each direction is compared"
            )
        if settings.validation.patience is not None:
            raise ConfigError(
                "validation.patience can stop one direction before the other; unset it, so that "
                "both train for the same number of steps"
            )
        data = open_data(settings.undivided(), 0, 1)
        if any(data_set.manifest.row_tokens is not None for data_set in data.data_sets):
            raise DirectionMismatchError(
                f"{settings.data.description} holds instruction examples, which have one "
                "direction; compare on shards of documents"
            )
        if not data.has_val:
            raise ShardsMissingError(
                f"{settings.data.description} has no val set to compare on; build one with "
                "--val-fraction"
            )
        num_documents = sum(one.manifest.total("val")["documents"] for one in data.val_sets)
        if num_documents < 2:
            raise SourceEmptyError(
                f"the val set of {settings.data.description} has fewer than 2 documents, which a "
                "standard error needs; build the shards with a larger --val-fraction"
            )


@dataclass(frozen=True)
class TrainedPair:
    """The verified checkpoints of a forward and a backward run that differ in nothing else."""

    seed: int
    forward: Path
    backward: Path
    meta: "CheckpointMeta"
    """Metadata of the forward checkpoint."""

    @classmethod
    def find(cls, forward: ArrowRun, backward: ArrowRun) -> "TrainedPair":
        """The newest checkpoints of two runs.

        Raises CheckpointMissingError, CheckpointCorruptError, DirectionMismatchError and
        RunMismatchError.
        """
        from megaback.checkpoints.checkpoint import find_checkpoint

        (first, meta), (second, other) = (
            find_checkpoint(run.folder) for run in (forward, backward)
        )
        for run, target, found in ((forward, first, meta), (backward, second, other)):
            if found.format.directions.value != run.direction.value:
                raise DirectionMismatchError(
                    f"{target} writes {found.format.directions.value}, but must write "
                    f"{run.direction.value}; use a run folder of its own for megaback arrow"
                )
        try:
            facts = list(_facts(meta, other))
        except (KeyError, TypeError, AttributeError):
            raise CheckpointCorruptError(
                f"{first} or {second}: {META_NAME} lacks the settings of its training; restore it, "
                "or train the pair again"
            ) from None
        for name, here, there in facts:
            if here != there:
                raise RunMismatchError(
                    f"{first} has {name} = {here}, but {second} has {there}; train both directions "
                    "with the same config"
                )
        return cls(forward.seed, first, second, meta)

    def require_config(self, config: Config, fingerprint: str) -> None:
        """Require that both runs were trained by a config, on shards with this fingerprint.

        Raises RunMismatchError.
        """
        from megaback.training.start import changes_on_resume

        changes = {
            key: change
            for key, change in changes_on_resume(self.meta.config, config).items()
            if key.split(".")[0] in TRAINED_SECTIONS and key != "training.seed"
        }
        if self.meta.data_fingerprint != fingerprint:
            changes["the shards"] = (self.meta.data_fingerprint[:12], fingerprint[:12])
        for name, (there, here) in changes.items():
            raise RunMismatchError(
                f"{self.forward} was trained with {name} = {there}, and the config has {here}; "
                "restore the config, or choose another run"
            )

    @property
    def models_hash(self) -> str:
        """Hash of the files of both checkpoints."""
        from megaback.checkpoints.checkpoint import read_meta

        files = [read_meta(target).files for target in (self.forward, self.backward)]
        return hashlib.sha256(json.dumps(files).encode()).hexdigest()

    def models(self, device: "torch.device") -> "Iterator[tuple[Direction, ReverseGPT]]":
        """The two models, one after the other."""
        for direction, target in zip(DIRECTIONS, (self.forward, self.backward), strict=True):
            yield direction, _load(target, device)


def _facts(meta: "CheckpointMeta", other: "CheckpointMeta") -> Iterator[tuple[str, Any, Any]]:
    yield "step", meta.step, other.step
    yield "updates", meta.updates, other.updates
    yield "the shards", meta.data_fingerprint[:12], other.data_fingerprint[:12]
    yield "order_version", meta.order_version, other.order_version
    for section in TRAINED_SECTIONS:
        for key, value in meta.config[section].items():
            yield f"{section}.{key}", value, other.config[section][key]
    rows = (one.config["data"].get("rows", "stream") for one in (meta, other))
    yield "data.rows", *rows
    for key in ("lanes", "window_frames"):
        yield f"data.{key}", meta.config["data"][key], other.config["data"][key]


def _load(target: Path, device: "torch.device") -> "ReverseGPT":
    import torch

    from megaback.model.attention_choice import choose_attention
    from megaback.model.gpt import ReverseGPT
    from megaback.weights.source import open_checkpoint

    source = open_checkpoint(target)
    shape = source.description.shape
    attention = choose_attention("auto", device, torch.float32, shape.head_size)
    model = ReverseGPT(shape, source.description.vocab_size, attention.backend)
    source.fill(model)
    return model.to(device).eval()
