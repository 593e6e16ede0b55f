"""What a run that resumes cannot know of the steps before, as its metrics are not there.

Weights and optimizer state are exact or refused. What the guard and early stopping remember is read
from metrics.jsonl, which a run that was fetched from its second place does not have.
"""

from megaback.config import Config
from megaback.run_folder import METRICS_NAME
from megaback.tracking.metrics import read_metrics


def history_gap(config: Config, start_step: int) -> str | None:
    """The sentence that says so, if anything that the config uses is missing."""
    lines = read_metrics(config.run) if (config.run / METRICS_NAME).exists() else []
    steps = {line["step"] for line in lines}
    window = min(config.guard.window_steps, start_step)
    num_missing = sum(step not in steps for step in range(start_step - window + 1, start_step + 1))
    measured = any("val_loss" in line and line["step"] <= start_step for line in lines)
    affected = []
    if num_missing:
        affected.append(f"the guard judges by {window - num_missing} of {window} earlier steps")
    if config.validation.patience is not None and not measured:
        affected.append("early stopping counts from this step")
    if not affected:
        return None
    return f"{config.run / METRICS_NAME} lacks earlier steps: {', and '.join(affected)}"
