"""Result of a sweep: the loss of each setting, with the noise over its seeds.

A setting is a combination of all values but the seed's. Its loss is the mean over seeds of the val
loss at the end of a run, or of the lowest one with early stopping; without a val set, of the mean
training loss of the last steps. Loads no torch.
"""

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import NonFiniteError
from megaback.faults.exit_record import START_EVENT, read_history
from megaback.faults.run_state import assess_run
from megaback.scoring.paired_difference import standard_error_of_mean
from tools.status import status_of
from tools.sweeps.axes import SEED_KEY
from tools.sweeps.record import Record

DIVERGED = "diverged"
LossKind = Literal["val", "training"]


@dataclass(frozen=True, kw_only=True)
class RunResult:
    """State and loss of one run."""

    name: str
    values: dict[str, Any]
    state: str = "not started"
    """State as of `megaback watch`, `diverged` or `not started`."""
    reason: str | None = None
    """Reason of the state, unless the run is finished."""
    step: int = 0
    loss: float | None = None
    """Loss in nats per token, of a finished run."""
    kind: LossKind | None = None
    """Data on which the loss was measured."""

    @property
    def is_over(self) -> bool:
        """Whether there is nothing left to train: the run is finished, or has diverged."""
        return self.state in ("finished", DIVERGED)


@dataclass(frozen=True, kw_only=True)
class Setting:
    """Loss of one combination of values over its seeds."""

    values: dict[str, Any]
    losses: dict[int, float]
    """Loss of each seed, of finished runs."""
    num_runs: int
    num_diverged: int

    @property
    def loss(self) -> float | None:
        """Mean loss; None if a run diverged, or none is finished."""
        if self.num_diverged or not self.losses:
            return None
        return statistics.fmean(self.losses.values())

    @property
    def error(self) -> float | None:
        """Standard error of the mean over seeds; None for fewer than two."""
        return standard_error_of_mean([*self.losses.values()])

    @property
    def num_unfinished(self) -> int:
        return self.num_runs - len(self.losses) - self.num_diverged

    def above(self, best: "Setting") -> tuple[float, float | None] | None:
        """Mean difference from the best setting over the seeds of both, and its standard error."""
        common = self.losses.keys() & best.losses.keys()
        if self.loss is None or not common:
            return None
        differences = [self.losses[seed] - best.losses[seed] for seed in sorted(common)]
        return statistics.fmean(differences), standard_error_of_mean(differences)


@dataclass(frozen=True)
class SweepResult:
    """Runs and settings of a sweep; settings sorted by loss, then diverged and unfinished ones."""

    keys: tuple[str, ...]
    """Keys of the axes but the seed's."""
    runs: list[RunResult]
    settings: list[Setting]

    @property
    def best(self) -> Setting | None:
        """Setting with the lowest mean loss of those with most seeds."""
        measured = [one for one in self.settings if one.loss is not None]
        max_seeds = max((len(one.losses) for one in measured), default=0)
        return next((one for one in measured if len(one.losses) == max_seeds), None)

    @property
    def kind(self) -> LossKind:
        return next((run.kind for run in self.runs if run.kind is not None), "val")

    def to_json(self) -> dict[str, Any]:
        """Fields of the record: `runs` and `settings`."""
        settings = []
        for one in self.settings:
            above = None if self.best is None else one.above(self.best)
            settings.append(
                {
                    "values": one.values,
                    "loss": one.loss,
                    "error": one.error,
                    "seeds": {str(seed): loss for seed, loss in one.losses.items()},
                    "is_best": one is self.best,
                    "above_best": None if above is None else above[0],
                    "above_best_error": None if above is None else above[1],
                    "diverged": one.num_diverged,
                    "unfinished": one.num_unfinished,
                }
            )
        runs = [
            {
                "name": run.name,
                "values": run.values,
                "state": run.state,
                "reason": run.reason,
                "step": run.step,
                "loss": run.loss,
            }
            for run in self.runs
        ]
        return {"loss_of": self.kind, "settings": settings, "runs": runs}


def result_of(record: Record, out: Path, known: SweepResult | None = None) -> SweepResult:
    """The result of a sweep from its folder, finished or not.

    Runs that were over in an earlier result, `known`, are not read again. Raises
    CheckpointCorruptError for metrics of another version.
    """
    now = time.time()

    def stops_early(values: Mapping[str, Any]) -> bool:
        patience = record.config.get("validation", {}).get("patience")
        return values.get("validation.patience", patience) is not None

    over = {run.name: run for run in known.runs if run.is_over} if known is not None else {}
    runs = [
        over.get(name) or run_result(out / name, values, now, stops_early(values))
        for name, values in record.runs.items()
    ]
    keys = tuple(key for key in record.keys if key != SEED_KEY)
    grouped: dict[str, list[RunResult]] = {}
    for run in runs:
        grouped.setdefault(repr([run.values[key] for key in keys]), []).append(run)
    settings = [_setting(keys, group) for group in grouped.values()]
    settings.sort(key=lambda one: (one.loss is None, one.loss or 0.0, one.num_diverged > 0))
    return SweepResult(keys, runs, settings)


def run_result(run: Path, values: Mapping[str, Any], now: float, stops_early: bool) -> RunResult:
    """State and loss of a run from its folder. `stops_early`: its lowest val loss counts."""
    if not any(line.get("event") == START_EVENT for line in read_history(run)):
        return RunResult(name=run.name, values=dict(values))
    status = status_of(run, now)
    state, code = status.health.state, assess_run(run, (), now).code
    has_diverged = code == NonFiniteError.exit_code
    measured = status.best_validation if stops_early else status.validation
    kind: LossKind = "training" if measured is None else "val"
    loss = status.loss if measured is None else measured.loss
    # Non-finite to its end, so that it has learned nothing since.
    is_stuck = status.skipped.get(status.step, "").endswith(("nan", "inf"))
    has_diverged = has_diverged or (state == "finished" and (loss is None or is_stuck))
    return RunResult(
        name=run.name,
        values=dict(values),
        state=DIVERGED if has_diverged else state,
        reason=None if state == "finished" else status.health.reason,
        step=status.step,
        loss=loss if state == "finished" and not has_diverged else None,
        kind=kind,
    )


def _setting(keys: Sequence[str], runs: Sequence[RunResult]) -> Setting:
    return Setting(
        values={key: runs[0].values[key] for key in keys},
        losses={run.values.get(SEED_KEY, 0): run.loss for run in runs if run.loss is not None},
        num_runs=len(runs),
        num_diverged=sum(run.state == DIVERGED for run in runs),
    )
