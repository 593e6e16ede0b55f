"""Missing metrics of a resumed run, which the step guard and early stopping depend on.

Weights and optimizer state are restored exactly or not at all. The state of the guard and of early
stopping is read from metrics.jsonl, which a run that was fetched from `copy_to` lacks.
"""

from megaback.config import Config
from megaback.run_folder import METRICS_NAME
from megaback.tracking.metrics import read_metrics
from megaback.training.suites import Suites


def history_gap(config: Config, start_step: int, guarded_since: int = 0) -> str | None:
    """Message about missing metrics that the config uses; None if there are none.

    `guarded_since`: number of steps before the first one that the guard compares with.
    """
    lines = read_metrics(config.run) if (config.run / METRICS_NAME).exists() else []
    steps = {line["step"] for line in lines}
    window = min(config.guard.window_steps, start_step - guarded_since)
    num_missing = sum(step not in steps for step in range(start_step - window + 1, start_step + 1))
    measured = any("val_loss" in line and line["step"] <= start_step for line in lines)
    affected = []
    if num_missing:
        affected.append(f"the guard compares with {window - num_missing} of {window} earlier steps")
    if config.validation.patience is not None and not measured:
        affected.append("early stopping counts from this step")
    if not affected:
        return None
    return f"{config.run / METRICS_NAME} lacks earlier steps: {', and '.join(affected)}"


def other_suites(config: Config, suites: Suites, start_step: int) -> str | None:
    """Message if the suites were measured on other rows before the resume."""
    lines = read_metrics(config.run) if (config.run / METRICS_NAME).exists() else []
    measured = [line for line in lines if "suites" in line and line["step"] <= start_step]
    if not measured or measured[-1].get("suites_sha256") == suites.sha256:
        return None
    return (
        f"the rows of validation.suites are not those of step {measured[-1]['step']:,} and before: "
        "compare values of the same rows only"
    )
