"""Early stopping on validation loss.

The state is a function of the validations so far, which are in `metrics.jsonl`, so that a resumed
run stops at the same step as an uninterrupted one.
"""

import math
from collections.abc import Iterable
from pathlib import Path

from data_pipeline.common.atomic import write_text
from megaback.faults.start_fence import NO_FENCE, Fence
from megaback.run_folder import BEST_NAME, CHECKPOINTS_FOLDER, META_NAME, METRICS_NAME, step_name
from megaback.tracking.metrics import read_metrics


class EarlyStopping:
    """Counter of consecutive validations without a new best loss."""

    def __init__(
        self, patience: int | None, earlier: Iterable[tuple[int, float | None]] = ()
    ) -> None:
        """`earlier`: step and loss of each validation so far. Without patience, it never stops."""
        self._patience = patience
        self._best_loss = math.inf
        self._since = 0
        self.best_step: int | None = None
        """Step of the best loss; None while every val loss is non-finite."""
        for step, loss in earlier:
            self.measured(step, loss)

    def measured(self, step: int, loss: float | None) -> None:
        """Count a validation; a loss that is None or non-finite is no improvement."""
        if loss is not None and loss < self._best_loss:
            self._best_loss, self.best_step, self._since = loss, step, 0
        else:
            self._since += 1

    @property
    def is_exhausted(self) -> bool:
        return self._patience is not None and self._since >= self._patience

    def is_kept(self, step: int) -> bool:
        """Whether the checkpoint of this step is kept as the best one."""
        return self._patience is not None and step == self.best_step

    @property
    def reason(self) -> str:
        """Reason for stopping early."""
        best = (
            "no val loss was finite"
            if self.best_step is None
            else f"val loss did not fall below {self._best_loss:.4f} (step {self.best_step})"
        )
        validations = "validation" if self._since == 1 else "validations"
        return f"stopped early: {best} in {self._since} {validations}"


def read_measurements(run: Path, last_step: int) -> list[tuple[int, float | None]]:
    """Step and val loss of each validation of a run up to `last_step`, oldest first."""
    if not (run / METRICS_NAME).exists():
        return []
    return [
        (line["step"], line["val_loss"])
        for line in read_metrics(run)
        if "val_loss" in line and line["step"] <= last_step
    ]


def mark_best(run: Path, step: int | None, fence: Fence = NO_FENCE) -> None:
    """Write or remove the mark `best`, depending on whether the checkpoint is complete."""
    folder = run / CHECKPOINTS_FOLDER
    if step is not None and (folder / step_name(step) / META_NAME).is_file():
        write_text(folder / BEST_NAME, step_name(step) + "\n", fence.replace)
    else:
        fence.check()
        (folder / BEST_NAME).unlink(missing_ok=True)
