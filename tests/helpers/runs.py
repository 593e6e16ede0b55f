"""Run folders as training writes them, for tests of commands that read them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from megaback.faults.exit_record import record_exit, record_start
from megaback.run_folder import METRICS_NAME
from megaback.tracking.metrics import read_metrics

ROW_TOKENS = 2048
ALL_KEPT = ("weights", "optimizer", "schedule", "data")


def add_suites(run: Path, at: dict[int, dict[str, Any]]) -> None:
    """Append measurements of suites, by step, to a run's metrics."""
    with (run / METRICS_NAME).open("a") as file:
        for step, suites in at.items():
            file.write(json.dumps({"step": step, "suites": suites, "suite_s": 1.0}) + "\n")


def suite_metric(value: float, chance: float | None = 0.25) -> dict[str, Any]:
    """A metric with an interval of 0.1 on either side."""
    fields = {"value": value, "low": value - 0.1, "high": value + 0.1, "rows": 200}
    return fields if chance is None else {**fields, "chance": chance}


def finished_steps(run: Path, steps: int, skipped: int = 5) -> Path:
    """A run's folder after `steps` steps, with one restart and one skipped step."""
    run.mkdir()
    record_start(run, step=0, total_steps=100, world_size=2, zero_stage=1)
    record_exit(run, 75, "preempted", "SIGTERM came", 0)
    record_start(run, step=3, total_steps=100, world_size=4, zero_stage=2)
    lines: list[dict[str, Any]] = [{"step": 0, "val_loss": 9.0, "val_bits_per_byte": 4.0}]
    for step in range(1, steps + 1):
        lines.append(
            {
                "step": step,
                "loss": None if step == skipped else 9.0 - step / 100,
                "targets": 2000,
                "learning_rate": 0.001 * step,
                "gradient_norm": None if step == skipped else 1.0,
                "step_s": 0.5,
                "tokens_seen": step * ROW_TOKENS,
                "tokens_per_s": 2 * ROW_TOKENS,
                **({"skipped": "the loss is nan"} if step == skipped else {}),
            }
        )
        if step % 10 == 0:
            by_context = {
                name: {"loss": loss, "bits_per_byte": None, "targets": 9}
                for name, loss in {"1": 9.0 - step / 100, "2": 8.0, "33-64": 7.0}.items()
            }
            measured = {"val_loss": 8.0, "val_bits_per_byte": 3.5}
            lines.append({"step": step, **measured, "val_by_context": by_context})
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def add_branch(trunk: Path, name: str, at: int, steps: int, kept: Sequence[str] = ALL_KEPT) -> Path:
    """A finished branch that left a run at a step, with losses of 5.0.

    Its metrics begin with some of the trunk's last lines, as those that training writes.
    """
    branch = trunk / "branches" / name
    branch.mkdir(parents=True)
    first = at if "schedule" in kept else 0
    checkpoint = {"path": f"{trunk}/checkpoints/step-{at:08d}", "step": at, "sha256": "0" * 64}
    total = first + steps
    record_start(branch, step=first, total_steps=total, branch={**checkpoint, "kept": list(kept)})
    lines = [line for line in read_metrics(trunk) if at - 3 < line["step"] <= at and "loss" in line]
    lines = lines if first else []
    for step in range(first + 1, total + 1):
        fields = {"step": step, "loss": 5.0, "learning_rate": 0.0, "gradient_norm": 1.0}
        seen = {"tokens_seen": step * ROW_TOKENS, "tokens_per_s": ROW_TOKENS, "step_s": 1.0}
        lines.append({**fields, **seen})
    lines.append({"step": total, "val_loss": 4.5, "val_bits_per_byte": 2.0})
    (branch / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    record_exit(branch, 0, "finished", "trained to the end", 0)
    return branch


def add_directions(run: Path, at: dict[int, tuple[float, float]]) -> None:
    """Add the backward and the forward val loss of a model of both to validations."""
    lines = read_metrics(run)
    for line in lines:
        if "val_loss" in line and line["step"] in at:
            line["val_by_direction"] = {
                name: {"loss": loss, "bits_per_byte": None, "targets": 1}
                for name, loss in zip(("backward", "forward"), at[line["step"]], strict=True)
            }
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
