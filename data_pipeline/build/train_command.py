"""The suggested training command of a data set: a config, and the overrides that the data needs.

Its run folder is new, so that an existing run does not stop it.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, count
from pathlib import Path
from typing import Any

import yaml

from data_pipeline.common.checked_json import checked, read_json
from data_pipeline.common.next_command import command, free_path, override
from data_pipeline.common.shipped import config_path
from data_pipeline.shards.manifest import Manifest
from data_pipeline.text.codec import Direction, TextFormat, Unit

RUNS_FOLDER = Path("runs")
_MAX_DEMO_PIECES = 16_384
"""Largest vocabulary for the shipped small model: with a larger one it is mostly embedding."""
_MINUTES = 30
"""Duration of the run that is suggested for larger ones."""
_OF_A_MODEL = ("model", "training")
"""The sections of a run's config that are compared."""


@dataclass(frozen=True)
class Base:
    """A run that can be fine-tuned."""

    run: Path
    config: Mapping[str, Any]


def train_commands(shards: Path, manifest: Manifest) -> dict[str, str]:
    """Commands that train on a finished data set, each with a description."""
    if manifest.row_tokens is not None:
        return _fine_tune(shards, manifest)
    if manifest.vocab_size > _MAX_DEMO_PIECES:
        out = _free_config(shards)
        line = command("new", "--minutes", _MINUTES, "--shards", shards, "--out", out)
        return {line: "a config for this vocabulary, and how to train it"}
    config = config_path("demo.yaml")
    overrides = _common(shards, manifest)
    context_tokens = _value(config, "batch", "context_tokens") or 256
    if manifest.frame_tokens % context_tokens:
        largest = max(n for n in range(1, context_tokens + 1) if not manifest.frame_tokens % n)
        overrides.append(override("batch.context_tokens", largest))
    return {command("train", config, *overrides): "a small model, in minutes"}


def _free_config(shards: Path) -> Path:
    """A new YAML file in the working directory, named after the shards."""
    name = shards.resolve().name or "run"
    numbered = (Path(f"{name}-{number}.yaml") for number in count(2))
    return next(path for path in chain([Path(f"{name}.yaml")], numbered) if not path.exists())


def _common(shards: Path, manifest: Manifest) -> list[str]:
    run = free_path(RUNS_FOLDER / (shards.resolve().name or "run"))
    overrides = [override("run", run), override("data.shards", shards)]
    text_format = manifest.text_format
    is_fixed = manifest.row_tokens is not None or text_format.unit is Unit.WORD
    if is_fixed and text_format.direction is not Direction.BACKWARD:
        overrides.append(override("data.direction", text_format.direction.value))
    return overrides


def _fine_tune(shards: Path, manifest: Manifest) -> dict[str, str]:
    config = config_path("backchat.yaml")
    overrides = _common(shards, manifest)
    assert manifest.row_tokens is not None
    if (_value(config, "batch", "context_tokens") or 1024) % manifest.row_tokens:
        overrides.append(override("batch.context_tokens", manifest.row_tokens))
    if not manifest.split("val"):
        overrides.append(override("validation.patience", None))
    base = _find_base(shards, manifest.text_format)
    if base is None:
        line = command("train", config, "init_from=BASE", *overrides)
        return {line: "with a run or model of the same tokenizer and direction in place of BASE"}
    overrides.insert(0, override("init_from", base.run))
    ours = _value(config, "model") or {}
    theirs = base.config.get("model", {})
    overrides += [
        override(f"model.{key}", value)
        for key, value in theirs.items()
        if value is not None and ours and ours.get(key) != value
    ]
    precision = base.config.get("training", {}).get("precision")
    if precision != _value(config, "training", "precision"):
        overrides.append(override("training.precision", precision))
    return {command("train", config, *overrides): f"fine-tunes {base.run}"}


def _value(config: Path, *keys: str) -> Any:
    """A value in a config file; None if it is not there."""
    try:
        fields = yaml.safe_load(config.read_text(encoding="utf-8"))
        for key in keys:
            fields = fields[key]
    except (OSError, yaml.YAMLError, KeyError, TypeError):
        return None
    return fields


def _find_base(shards: Path, text_format: TextFormat) -> Base | None:
    """The newest run nearby that has a checkpoint of this text format."""
    newest: tuple[float, Base] | None = None
    for run in _runs_nearby(shards):
        metas = sorted((run / "checkpoints").glob("step-*/meta.json"))
        try:
            fields = read_json(metas[-1])
            found = TextFormat.from_dict(fields["text_format"])
            is_same = found.as_base_of(text_format) == text_format
            config = checked("config", fields["config"], dict)
            sections = {key: checked(key, config.get(key, {}), dict) for key in _OF_A_MODEL}
            base, age = Base(run, {**config, **sections}), metas[-1].stat().st_mtime
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            continue
        if is_same and not base.config.get("init_from") and (newest is None or age > newest[0]):
            newest = age, base
    return None if newest is None else newest[1]


def _runs_nearby(shards: Path) -> Iterator[Path]:
    for folder in {RUNS_FOLDER, Path("demo"), shards.parent}:
        if folder.is_dir():
            yield from (path for path in sorted(folder.iterdir()) if path.is_dir())
