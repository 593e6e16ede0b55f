"""Record of a sweep, `sweep.json` in its folder: its axes, config, runs, and their result.

It is written before the first run starts, so that the same command resumes the sweep, more values
can be added to it, and another config is refused. Loads no torch.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.atomic import write_text
from data_pipeline.common.next_command import override
from data_pipeline.common.output_paths import is_vacant, json_object_with, read_object
from data_pipeline.errors import CheckpointMissingError, OutputExistsError, RunMismatchError
from megaback.config_file import load_config
from megaback.shown_config import flat_fields, shown_config
from tools.sweeps.runs import SweepRun

RECORD_NAME, PICTURE_NAME = "sweep.json", "sweep.png"
_FORMAT_NAME, _FORMAT_VERSION = "megaback-sweep", 1
_FREE_SECTIONS = ("run", "hardware", "zero", "checkpoint", "logging")
"""Parts of the config that may change from one start of a sweep to the next."""

is_sweep = json_object_with("format", "keys", "config", "runs")


@dataclass(frozen=True)
class Record:
    """Axes and runs of a sweep."""

    keys: tuple[str, ...]
    """Keys of the axes."""
    config: dict[str, Any]
    """Config of its first run, without secrets."""
    runs: dict[str, dict[str, Any]]
    """Values of each run, by its name."""

    @classmethod
    def of(cls, runs: Sequence[SweepRun], keys: Sequence[str]) -> "Record":
        """The record of a new sweep."""
        values = {run.name: run.values for run in runs}
        return cls(tuple(keys), shown_config(runs[0].config), values)

    def with_runs(self, runs: Sequence[SweepRun]) -> "Record":
        """The record with more runs."""
        values = {run.name: run.values for run in runs}
        return Record(self.keys, self.config, {**self.runs, **values})

    def require_same(
        self, out: Path, path: Path, common: tuple[str, ...], keys: Sequence[str]
    ) -> None:
        """Require that a command continues this sweep: the same keys, and the same config.

        Raises RunMismatchError, and the errors of `load_config`.
        """
        if set(keys) != set(self.keys):
            raise RunMismatchError(
                f"{out} is a sweep over {', '.join(self.keys)}, and this one is over "
                f"{', '.join(keys)}; give another --out"
            )
        first = next(iter(self.runs.values()))
        own = (override(key, value) for key, value in first.items())
        before = flat_fields(self.config)
        for key, now in flat_fields(shown_config(load_config(path, (*common, *own)))).items():
            is_free = key.partition(".")[0] in _FREE_SECTIONS
            if not is_free and before.get(key, now) != now:
                raise RunMismatchError(
                    f"{out} was swept with {key} = {before[key]}, and the config has {now}; "
                    "restore it, or give another --out"
                )

    def write(self, out: Path, result: Mapping[str, Any]) -> None:
        """Write the record with the result of its runs. Raises OSError."""
        out.mkdir(parents=True, exist_ok=True)
        fields = {
            "format": _FORMAT_NAME,
            "version": _FORMAT_VERSION,
            "keys": self.keys,
            "config": self.config,
            **result,
        }
        write_text(out / RECORD_NAME, json.dumps(fields, indent=1) + "\n")


def read_record(out: Path) -> Record | None:
    """The record in a folder; None if the folder is empty or absent.

    Raises OutputExistsError if it is of another kind, or the record is damaged.
    """
    if not (out / RECORD_NAME).exists():
        if out.exists() and not (out.is_dir() and is_vacant(out)):
            raise OutputExistsError(
                f"{out} is not empty, and not the folder of a sweep; give another --out"
            )
        return None
    fields = read_object(out / RECORD_NAME)
    try:
        if fields is None or fields["format"] != _FORMAT_NAME:
            raise ValueError
        return Record(
            tuple(fields["keys"]),
            dict(fields["config"]),
            {str(run["name"]): dict(run["values"]) for run in fields["runs"]},
        )
    except (KeyError, TypeError, ValueError):
        raise OutputExistsError(
            f"{out / RECORD_NAME} is damaged, or not of a sweep; give another --out"
        ) from None


def require_record(out: Path) -> Record:
    """The record in the folder of a sweep. Raises CheckpointMissingError, OutputExistsError."""
    record = read_record(out) if (out / RECORD_NAME).exists() else None
    if record is None:
        raise CheckpointMissingError(
            f"{out} is not the folder of a sweep (no {RECORD_NAME}); give one, or a config"
        )
    return record
