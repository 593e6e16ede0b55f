"""Checks of a run's start: steps left, and keys changed on resume. Writes nothing.

A start is accepted once all checks have passed: until then the record of the run (`exit.json`,
`history.jsonl`, `config.yaml`, `metrics.jsonl`, heartbeats) is not changed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.errors import NonFiniteError
from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.config import Config
from megaback.faults.exit_record import read_exit
from megaback.shown_config import flat_fields, shown_fields
from megaback.training.early_stopping import EarlyStopping, read_measurements

Changes = dict[str, tuple[Any, Any]]


@dataclass(frozen=True)
class AlreadyTrained:
    """Result of starting a run whose steps are all done."""

    reason: str
    """Reason why the run ended, for its record."""
    message: str
    """Message for the user."""
    step: int
    is_recorded: bool
    """Whether the run's end is already recorded."""


def already_trained(
    config: Config, meta: CheckpointMeta, total_steps: int, end_reason: str | None = None
) -> AlreadyTrained | None:
    """The end of a run at its last checkpoint, or None.

    `end_reason`: reason why it ends before the steps of the config. Raises CheckpointCorruptError,
    OSError, and NonFiniteError again for a run that ended with it as it had skipped every step.
    """
    step, advice = meta.step, "raise training.steps to continue"
    ending = read_exit(config.run) or {}
    if step < total_steps:
        measured = read_measurements(config.run, step) or [(step, meta.val_loss)]
        patience = EarlyStopping(config.validation.patience, measured)
        if not patience.is_exhausted:
            return None
        reason, total_steps, advice = patience.reason, step, "raise validation.patience to continue"
    elif step > total_steps:
        reason = f"{step} steps are done, and the config has {total_steps}"
    elif end_reason is not None:
        reason, advice = end_reason, "raise max_epochs to continue"
    else:
        reason = "trained to the end"
    before = 0 if meta.branch is None else meta.branch.updates
    if ending.get("code") == NonFiniteError.exit_code and meta.updates == before:
        raise NonFiniteError(str(ending.get("reason")))
    has_finished = ending.get("code") == 0
    return AlreadyTrained(
        reason,
        f"nothing is left to do: {config.run} has done {step:,} of {total_steps:,} steps "
        f"({reason}); {advice}",
        step,
        # With fewer steps than are done, the config is not the run's.
        is_recorded=has_finished or step > total_steps,
    )


def changes_on_resume(before: Mapping[str, Any], config: Config) -> Changes:
    """Keys whose values differ from a checkpoint's config: (before, now).

    Keys that the checkpoint's version did not have are skipped; passwords and signatures of URLs
    are redacted.
    """
    earlier = flat_fields(shown_fields(before))
    now = flat_fields(shown_fields(config.model_dump(mode="json")))
    return {
        key: (earlier[key], value)
        for key, value in now.items()
        if key != "run" and key in earlier and earlier[key] != value
    }


def describe_changes(changes: Mapping[str, tuple[Any, Any]]) -> str:
    """The changes in one line, for the console."""
    return ", ".join(f"{key} {before} -> {now}" for key, (before, now) in changes.items())


def require_readable(run: Path) -> None:
    """Raises RunMismatchError or CheckpointCorruptError if a resume cannot read the run's files."""
    from megaback.faults.step_guard import read_excluded_steps
    from megaback.run_folder import METRICS_NAME, SAMPLES_NAME
    from megaback.tracking.metrics import read_metrics
    from megaback.tracking.samples_log import read_samples

    read_excluded_steps(run)
    if (run / METRICS_NAME).exists():
        read_metrics(run)
    if (run / SAMPLES_NAME).exists():
        read_samples(run)
