"""Curves from the metrics of runs, and the differences between their configs."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import yaml

from data_pipeline.common.checked_json import require_within
from data_pipeline.common.number_ranges import CONTEXT
from data_pipeline.errors import CheckpointCorruptError
from data_pipeline.text.codec import Direction
from megaback.faults.exit_record import read_history
from megaback.faults.run_ownership import config_of_run
from megaback.planning.config_text import scalar
from megaback.run_folder import METRICS_NAME
from megaback.shown_config import flat_fields
from megaback.yaml_text import read_yaml_file
from tools.run_views.branch_tree import RunLines, TreeRun, lines_of

Axis = Literal["step", "tokens", "time"]
Values = npt.NDArray[np.float64]

_MAX_POINTS = 2000


@dataclass(frozen=True)
class Curve:
    """One quantity over steps, tokens or time; shape (points,) each."""

    places: Values
    values: Values

    def thinned(self) -> "Curve":
        """At most `_MAX_POINTS` points, each the mean of consecutive ones."""
        every = -(-len(self.places) // _MAX_POINTS)
        if every <= 1:
            return self
        starts = np.arange(0, len(self.places), every)
        counts = np.diff([*starts, len(self.places)])
        return Curve(
            np.add.reduceat(self.places, starts) / counts,
            np.add.reduceat(self.values, starts) / counts,
        )

    def since(self, place: float) -> "Curve":
        """The points from a place on."""
        chosen = self.places >= place
        return Curve(self.places[chosen], self.values[chosen])

    def smoothed(self, steps: int) -> "Curve":
        """Moving mean over a window of at most `steps` points that ends at each point."""
        if steps <= 1 or not len(self.values):
            return self
        sums = np.concatenate([[0.0], np.cumsum(self.values)])
        stops = np.arange(1, len(self.values) + 1)
        starts = np.maximum(stops - steps, 0)
        return Curve(self.places, (sums[stops] - sums[starts]) / (stops - starts))


@dataclass(frozen=True)
class SuiteCurve:
    """First metric of a suite over steps, tokens or time; shape (points,) each."""

    metric: str
    places: Values
    values: Values
    low: Values
    """Lower bounds of 95% intervals; NaN if there is none."""
    high: Values
    rows: int
    chance: float | None


_NO_CURVE = Curve(np.empty(0), np.empty(0))


@dataclass(frozen=True)
class RunCurves:
    """Curves of a run; places are steps, tokens or hours of training steps."""

    name: str
    num_steps: int
    """Number of steps in its metrics; of a branch, since it left its trunk."""
    step: int
    """Last step, as the run counts them."""
    loss: Curve
    """Nats per token, of steps that were not skipped."""
    val_loss: Curve
    val_loss_by_direction: dict[str, Curve]
    """Val loss of each direction of a model of both."""
    context_loss: Curve
    """The last val loss by tokens of context; places are the upper bounds of buckets."""
    learning_rate: Curve
    gradient_norm: Curve
    tokens_per_s: Curve
    suites: dict[str, SuiteCurve]
    skipped: Values
    """Places of skipped steps."""
    restarts: Values
    """Places at which the run resumed."""
    begins: float = 0.0
    """Place at which a branch left its trunk. Curves of steps have the trunk's points before it,
    for moving means."""


def read_curves(run: Path | TreeRun, axis: Axis, name: str) -> RunCurves:
    """The curves of a run, which may have no points yet. A branch continues those of its trunk.

    Raises CheckpointMissingError if `run` is not a run, CheckpointCorruptError for metrics of
    another version.
    """
    run = run if isinstance(run, TreeRun) else TreeRun(run)
    try:
        return _curves(lines_of(run), read_history(run.path), axis, name)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointCorruptError(
            f"{run.path / METRICS_NAME} is not of this version of megaback, or damaged ({error}); "
            "read the run with the version that wrote it"
        ) from None


def _curves(
    of_run: RunLines,
    history: Sequence[Mapping[str, Any]],
    axis: Axis,
    name: str,
) -> RunCurves:
    lines = of_run.own
    own_steps = [line for line in lines if "learning_rate" in line]
    steps = [*(line for line in of_run.before if "learning_rate" in line), *own_steps]
    numbers = np.array([line["step"] for line in steps], dtype=np.float64)
    scale = {
        "step": numbers,
        "tokens": np.array([line["tokens_seen"] for line in steps], dtype=np.float64),
        "time": np.cumsum([line["step_s"] for line in steps], dtype=np.float64) / 3600,
    }[axis]

    def place_of(step: float) -> float:
        """Place of a step, interpolated between logged ones."""
        return float(np.interp(step, [0.0, *numbers], [0.0, *scale]))

    def curve(key: str, chosen: Sequence[Mapping[str, Any]]) -> Curve:
        known = [line for line in chosen if line[key] is not None]
        places = np.array([place_of(line["step"]) for line in known], dtype=np.float64)
        return Curve(places, np.array([line[key] for line in known], dtype=np.float64))

    def suite(name: str, measured: Sequence[Mapping[str, Any]]) -> SuiteCurve:
        metric = next(iter(measured[-1]["suites"][name]))
        known = [line for line in measured if metric in line["suites"].get(name, {})]
        metrics = [line["suites"][name][metric] for line in known]
        values, low, high = (
            np.array([one[key] for one in metrics], dtype=np.float64)  # None becomes NaN
            for key in ("value", "low", "high")
        )
        places = np.array([place_of(line["step"]) for line in known], dtype=np.float64)
        last = metrics[-1]
        return SuiteCurve(metric, places, values, low, high, last["rows"], last.get("chance"))

    suites = [line for line in lines if "suites" in line]
    validations = [line for line in lines if "val_loss" in line]
    starts = [line["step"] + of_run.offset for line in history if line.get("event") == "start"]
    return RunCurves(
        name=name,
        num_steps=len(own_steps),
        step=own_steps[-1]["step"] - of_run.offset if own_steps else 0,
        loss=curve("loss", [line for line in steps if "skipped" not in line]),
        val_loss=curve("val_loss", validations),
        val_loss_by_direction={
            direction.value: curve("loss", parts)
            for direction in Direction
            if (parts := _of_direction(validations, direction))
        },
        context_loss=_context_loss(validations[-1]) if validations else _NO_CURVE,
        learning_rate=curve("learning_rate", steps),
        gradient_norm=curve("gradient_norm", steps),
        tokens_per_s=curve("tokens_per_s", steps),
        suites={name: suite(name, suites) for name in suites[-1]["suites"]} if suites else {},
        skipped=np.array([place_of(line["step"]) for line in own_steps if "skipped" in line]),
        restarts=np.array([place_of(step) for step in starts[1:]]),
        begins=place_of(of_run.step),
    )


def _of_direction(
    validations: Sequence[Mapping[str, Any]], direction: Direction
) -> list[Mapping[str, Any]]:
    """The part of each validation that is of one direction, with its step."""
    return [
        {**line["val_by_direction"][direction.value], "step": line["step"]}
        for line in validations
        if "val_by_direction" in line
    ]


def _context_loss(validation: Mapping[str, Any]) -> Curve:
    """Loss by context of a validation; empty for runs of versions without it."""
    by_context = validation.get("val_by_context", {})
    known = {name: one["loss"] for name, one in by_context.items() if one["loss"] is not None}
    places = [int(name.rpartition("-")[2]) for name in known]
    for place in places:
        require_within("val_by_context", place, 1, int(CONTEXT.max))
    return Curve(
        np.array(places, dtype=np.float64), np.array(list(known.values()), dtype=np.float64)
    )


def names_in_tree(runs: Sequence[TreeRun]) -> list[str]:
    """Names of runs, and of branches with the name of their trunk before their own."""
    roots = [run for run in runs if run.trunk is None]
    names = dict(zip(roots, names_of([run.path for run in roots]), strict=True))
    for run in runs:
        if run.trunk is not None:
            names[run] = f"{names[run.trunk]}/{run.path.name}"
    return [names[run] for run in runs]


def names_of(runs: Sequence[Path]) -> list[str]:
    """The shortest suffixes of the paths that distinguish them."""
    parts = [run.resolve().parts for run in runs]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(one[-count:]) for one in parts]
        if len({*names}) == len({*parts}):
            break
    return names


def differences(runs: Sequence[Path]) -> list[tuple[str, list[str]]]:
    """Keys of the configs that differ between runs, with the value of each run as YAML."""
    configs = [
        {key: scalar(value) for key, value in flat_fields(_config(run)).items()} for run in runs
    ]
    keys = dict.fromkeys(key for config in configs for key in config)
    return [
        (key, values)
        for key in keys
        if key != "run" and len({*(values := [config.get(key, "") for config in configs])}) > 1
    ]


def _config(run: Path) -> dict[str, Any]:
    try:
        fields = read_yaml_file(config_of_run(run))
    except (OSError, yaml.YAMLError):
        return {}
    return fields if isinstance(fields, dict) else {}
