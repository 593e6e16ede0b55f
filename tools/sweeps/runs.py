"""Runs of a sweep: a config, a folder and a name for each combination of values.

All are validated before anything starts. Names are made of the values that the config resolves to,
so that 1e-3 and 0.001 are the same run. Loads no torch.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import getitem
from pathlib import Path
from typing import Any

from data_pipeline.common.next_command import override
from data_pipeline.errors import ConfigError
from megaback.config import Config
from megaback.config_file import load_config
from megaback.shown_config import shown_config
from tools.sweeps.axes import Point, overrides_of

_UNSAFE = re.compile(r"[^A-Za-z0-9.+-]+")
_MAX_NAME_CHARACTERS, _MAX_VALUE_CHARACTERS = 150, 30
_HASH_CHARACTERS = 8


@dataclass(frozen=True)
class SweepRun:
    """One run of a sweep."""

    name: str
    """Name of its folder."""
    values: dict[str, Any]
    """Value of each axis, as JSON."""
    overrides: tuple[str, ...]
    """Overrides of the config for this run."""
    config: Config


def runs_of(
    path: Path, common: tuple[str, ...], points: Sequence[Point], out: Path
) -> list[SweepRun]:
    """The run of each point, in a folder below `out`.

    Raises the errors of `load_config`, and ConfigError for two runs that are the same or
    one that makes several models.
    """
    runs: dict[str, SweepRun] = {}
    for point in points:
        own = (*common, *overrides_of(point))
        config = load_config(path, own)
        if config.optimizer.decay_at is not None:
            raise ConfigError(
                "optimizer.decay_at makes several models of one run; unset it and set "
                "training.steps, so that each run has one loss to compare"
            )
        fields = shown_config(config)
        values = {key: reduce(getitem, key.split("."), fields) for key in point}
        name = run_name(values)
        if name in runs:
            raise ConfigError(f"two runs are {name}; give each value of a key once")
        own = (*own, override("run", out / name))
        runs[name] = SweepRun(name, values, own, load_config(path, own))
    return list(runs.values())


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """The last part of each key, or the whole key where that is another's too."""
    last = [key.rpartition(".")[2] for key in keys]
    return {
        key: name if last.count(name) == 1 else key for key, name in zip(keys, last, strict=True)
    }


def value_text(value: Any) -> str:
    """A value, for names, tables and figures."""
    if isinstance(value, float):
        return f"{value:.6g}"
    return value if isinstance(value, str) else json.dumps(value)


def run_name(values: dict[str, Any]) -> str:
    """The name of a run's folder: `learning_rate-0.001_seed-0`.

    Values that are no safe or short name get a hash.
    """
    parts = [f"{name}-{_safe(values[key])}" for key, name in short_names([*values]).items()]
    name = "_".join(parts)
    if len(name) > _MAX_NAME_CHARACTERS:
        name = f"{name[:_MAX_NAME_CHARACTERS]}-{_hash(values)}"
    return name


def _safe(value: Any) -> str:
    text = value_text(value)
    safe = _UNSAFE.sub("-", text)[:_MAX_VALUE_CHARACTERS].strip("-.")
    is_exact = safe == text and (not isinstance(value, float) or float(text) == value)
    return safe if is_exact else f"{safe}-{_hash(value)}"


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:_HASH_CHARACTERS]


def data_kind(config: Config) -> str:
    """Text that is equal for runs with the same data, batches and length, whatever their seed."""
    training = config.training.model_copy(update={"seed": 0})
    sections = (config.data, config.batch, training, config.validation)
    return "".join(section.model_dump_json() for section in sections)
