"""What a start of a run is given, and what it changes. Nothing here writes into the run's folder.

A start is accepted once everything that can refuse it has been asked: until then the record of the
run (`exit.json`, `history.jsonl`, `config.yaml`, `metrics.jsonl`, heartbeats) stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.config import Config
from megaback.faults.exit_record import read_exit
from megaback.shown_config import shown_fields
from megaback.training.early_stopping import EarlyStopping, read_measurements

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class AlreadyTrained:
    """A start that has no step to take."""

    reason: str
    """Reason why the run ended, as its record says it."""
    message: str
    """Message for the user."""
    step: int
    is_recorded: bool
    """Whether the record already says how the run ended, and so stays as it is."""


def already_trained(
    config: Config, meta: CheckpointMeta, total_steps: int
) -> AlreadyTrained | None:
    """Whether a run has ended at its newest checkpoint. Raises CheckpointCorruptError, OSError."""
    step, advice = meta.step, "raise training.steps to train on"
    if step < total_steps:
        measured = read_measurements(config.run, step) or [(step, meta.val_loss)]
        patience = EarlyStopping(config.validation.patience, measured)
        if not patience.is_exhausted:
            return None
        reason, total_steps, advice = patience.reason, step, "raise validation.patience to train on"
    elif step > total_steps:
        reason = f"{step} steps are done, and the config has {total_steps}"
    else:
        reason = "trained to the end"
    ending = read_exit(config.run)
    has_finished = ending is not None and ending.get("code") == 0
    return AlreadyTrained(
        reason,
        f"nothing is left to do: {config.run} has done {step:,} of {total_steps:,} steps "
        f"({reason}); {advice}",
        step,
        # With fewer steps than are done, the config is not that of the run.
        is_recorded=has_finished or step > total_steps,
    )


def changes_on_resume(before: Mapping[str, Any], config: Config) -> Changes:
    """The keys whose values are not those of a checkpoint's config: before, and now.

    Keys that the checkpoint's version did not have are left out, and so are passwords and
    signatures of addresses.
    """
    earlier = _flat(shown_fields(before))
    now = _flat(shown_fields(config.model_dump(mode="json")))
    return {
        key: (earlier[key], value)
        for key, value in now.items()
        if key != "run" and key in earlier and earlier[key] != value
    }


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """The changes in one line, for people."""
    return ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changes.items())


def require_readable(run: Path) -> None:
    """Raises RunMismatchError or CheckpointCorruptError for what a resumed run reads and cannot."""
    from megaback.faults.step_guard import read_excluded_steps
    from megaback.run_folder import METRICS_NAME
    from megaback.tracking.metrics import read_metrics

    read_excluded_steps(run)
    if (run / METRICS_NAME).exists():
        read_metrics(run)


def _flat(fields: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in fields.items():
        if isinstance(value, Mapping):
            flat |= _flat(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat
