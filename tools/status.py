"""`megaback status`: progress, history and expected end of a run, on one screen.

It reads only the run's folder. `megaback watch` checks whether a run makes progress.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.durations import duration
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import fit
from data_pipeline.errors import CheckpointCorruptError
from megaback.faults.exit_record import read_history
from megaback.run_folder import HISTORY_NAME, META_NAME, METRICS_NAME, complete_checkpoints, step_of
from megaback.tracking.metrics import MIN_DATA_WAIT_SHARE, losses_apart, read_metrics
from tools.run_views.branch_tree import Departure, TreeRun, departure_of, tree_lines
from tools.watch import Health, health_of

_RECENT_STEPS = 50
_MAX_EVENTS = 12


@dataclass(frozen=True)
class Validation:
    """A measurement of the whole val set."""

    step: int
    loss: float | None
    bits_per_byte: float | None
    by_direction: dict[str, float | None]
    """Loss of each direction of a model of both; else empty."""


@dataclass(frozen=True)
class Status:
    """Status of a run from its folder; None for values that are not known yet."""

    run: str
    health: Health
    step: int
    total_steps: int | None
    tokens_seen: int
    loss: float | None
    """Mean loss of the last steps that were not skipped."""
    validation: Validation | None
    best_validation: Validation | None
    data_shares: dict[str, float]
    """Share of each data set in the rows of the last steps, of a mixture that changes."""
    suites: dict[str, Any] | None
    """Last measurement of the suites: `step`, and `suites` as in the metrics."""
    tokens_per_s: float | None
    data_wait_share: float | None
    """Share of the last steps' time spent waiting for the slowest loader."""
    memory_peak_bytes: int | None
    left_s: float | None
    """Estimated remaining time in seconds, at the median step time; 0 for a finished run."""
    skipped: dict[int, str]
    """Skipped steps, and why."""
    excluded_steps: int
    """Number of steps excluded by a rollback."""
    checkpoints: list[int]
    """Steps of the complete checkpoints."""
    checkpoint_age_s: float | None
    history: list[dict[str, Any]]
    """Starts, ends and other events, oldest first."""
    departure: Departure | None
    """Point at which the run left its trunk, if it is a branch."""
    branches: "list[Status]"
    """The status of each branch in the run's folder."""


def status_of(run: Path | TreeRun, now: float) -> Status:
    """The status of a run and its branches at time `now`, in seconds since the epoch.

    Raises CheckpointMissingError if it is not a run, CheckpointCorruptError for metrics of another
    version.
    """
    tree = run if isinstance(run, TreeRun) else TreeRun(run)
    run = tree.path
    lines = read_metrics(run) if (run / METRICS_NAME).is_file() else []
    branches = [status_of(branch, now) for branch in tree.branches()]
    try:
        health = health_of(run, now)
        if health.state == "stopped" and health.step is not None:  # also after a rollback
            lines = [line for line in lines if line["step"] <= health.step]
        return _status(run, health, lines, read_history(run), branches, now)
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise CheckpointCorruptError(
            f"{run / METRICS_NAME} is not of this version of megaback, or damaged ({error}); read "
            "the run with the version that wrote it"
        ) from None


def _status(
    run: Path,
    health: Health,
    lines: Sequence[Mapping[str, Any]],
    history: list[dict[str, Any]],
    branches: list[Status],
    now: float,
) -> Status:
    steps = [line for line in lines if "learning_rate" in line]
    with_loss = [
        line["loss"] for line in steps if "skipped" not in line and line["loss"] is not None
    ]
    validations = [
        Validation(
            line["step"],
            line["val_loss"],
            line["val_bits_per_byte"],
            {name: part["loss"] for name, part in line.get("val_by_direction", {}).items()},
        )
        for line in lines
        if "val_loss" in line
    ]
    measured = [one for one in validations if one.loss is not None]
    totals = [line["total_steps"] for line in history if line.get("total_steps") is not None]
    step = max((line["step"] for line in lines), default=0)
    recent = steps[-_RECENT_STEPS:]
    step_s = statistics.median(line["step_s"] for line in recent) if recent else None
    left_s = None
    if health.state == "finished":
        left_s = 0.0
    elif totals and step_s is not None:
        left_s = max(totals[-1] - step, 0) * step_s
    complete = complete_checkpoints(run)
    return Status(
        run=str(run),
        health=health,
        step=step,
        total_steps=totals[-1] if totals else None,
        tokens_seen=steps[-1]["tokens_seen"] if steps else 0,
        loss=statistics.fmean(with_loss[-_RECENT_STEPS:]) if with_loss else None,
        validation=validations[-1] if validations else None,
        data_shares=_data_shares(recent),
        suites=next(
            (
                {"step": line["step"], "suites": line["suites"]}
                for line in reversed(lines)
                if "suites" in line
            ),
            None,
        ),
        best_validation=min(measured, key=lambda one: (one.loss or 0.0, one.step), default=None),
        tokens_per_s=(
            statistics.median(line["tokens_per_s"] for line in recent) if recent else None
        ),
        data_wait_share=_data_wait_share(recent),
        memory_peak_bytes=recent[-1].get("memory_peak_bytes") if recent else None,
        left_s=left_s,
        skipped={line["step"]: line["skipped"] for line in steps if "skipped" in line},
        excluded_steps=sum("excluded" in line for line in lines),
        checkpoints=[step_of(path) for path in complete],
        checkpoint_age_s=now - (complete[-1] / META_NAME).stat().st_mtime if complete else None,
        history=history,
        departure=departure_of(history),
        branches=branches,
    )


def _data_wait_share(steps: Sequence[Mapping[str, Any]]) -> float | None:
    known = [line for line in steps if "data_wait_share" in line]
    if not known:
        return None
    waited_s = sum(line["data_wait_share"] * line["step_s"] for line in known)
    return float(waited_s / sum(line["step_s"] for line in known))


def screen(status: Status, now: float) -> str:
    """The status as text."""
    health = status.health
    rows = [("state", f"{health.state}: {health.reason}"), ("step", _steps(status))]
    if status.loss is not None:
        rows.append(("loss", f"{status.loss:.4f} nats/token over the last steps"))
    if status.validation is not None:
        rows.append(("val loss", _validations(status)))
    if status.data_shares:
        shares = ", ".join(f"{name} {share:.1%}" for name, share in status.data_shares.items())
        rows.append(("data", f"{shares} of the last steps' rows"))
    if status.suites is not None:
        rows.append(("suites", _suites(status.suites)))
    if status.tokens_per_s is not None:
        rows.append(("pace", _pace(status)))
    if health.slow_rank is not None:
        rows.append(("slow rank", health.slow_rank))
    if status.left_s:
        rows.append(("left", _left(status, now)))
    if status.checkpoints:
        age = (
            "" if status.checkpoint_age_s is None else f", {duration(status.checkpoint_age_s)} old"
        )
        kept = f"; {len(status.checkpoints)} are kept" if len(status.checkpoints) > 1 else ""
        rows.append(("checkpoint", f"step {status.checkpoints[-1]:,}{age}{kept}"))
    if status.skipped:
        last, why = list(status.skipped.items())[-1]
        count = len(status.skipped)
        rows.append(("skipped", f"{count} step{'s' * (count > 1)}; the last is {last:,}: {why}"))
    if status.excluded_steps:
        rows.append(("excluded", f"{status.excluded_steps:,} steps, by megaback rollback"))
    if status.departure is not None:
        left = status.departure
        rows.append(("branch", f"of {left.checkpoint}, step {left.step:,}"))
    lines = [status.run, *(f"  {name:<11}{text}" for name, text in rows)]
    if status.branches:
        tree = tree_lines(status, lambda one: one.branches, _in_tree)
        lines += ["branches", *(f"  {line}" for line in tree)]
    lines.append("history")
    hidden = len(status.history) - _MAX_EVENTS
    if hidden > 0:
        lines.append(f"  … {hidden} earlier ones in {HISTORY_NAME}")
    lines += [f"  {_event(line)}" for line in status.history[-_MAX_EVENTS:]]
    return "\n".join(lines)


def _data_shares(steps: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    rows: Counter[str] = Counter()
    for line in steps:
        rows.update({name: part["rows"] for name, part in line.get("by_data_set", {}).items()})
    return {name: count / rows.total() for name, count in rows.items()} if rows.total() else {}


def _in_tree(status: Status) -> str:
    """A run in a line of its tree."""
    total = "" if status.total_steps is None else f" of {status.total_steps:,}"
    left = "" if status.departure is None else f" from step {status.departure.step:,}"
    loss = "" if status.validation is None else f", val loss {_number(status.validation.loss)}"
    name = Path(status.run).name
    return f"{name}{left}: {status.health.state}, step {status.step:,}{total}{loss}"


def _number(loss: float | None) -> str:
    return "non-finite" if loss is None else f"{loss:.4f}"


def _steps(status: Status) -> str:
    share = ""
    if status.total_steps and status.step <= status.total_steps:
        share = f" of {status.total_steps:,} ({status.step / status.total_steps:.1%})"
    return f"{status.step:,}{share}, {status.tokens_seen:,} tokens"


def _pace(status: Status) -> str:
    parts = [f"{status.tokens_per_s:,.0f} tokens/s"]
    if status.data_wait_share is not None and status.data_wait_share > MIN_DATA_WAIT_SHARE:
        parts.append(f"data wait {status.data_wait_share:.0%}")
    if status.memory_peak_bytes is not None:
        parts.append(f"{status.memory_peak_bytes / 1e9:.1f} GB")
    return ", ".join(parts)


def _validations(status: Status) -> str:
    last, best = status.validation, status.best_validation
    assert last is not None
    loss = _number(last.loss) + ("" if last.loss is None else " nats/token")
    loss += losses_apart(last.by_direction)
    bits = "" if last.bits_per_byte is None else f", {last.bits_per_byte:.4f} bits/byte"
    lowest = ""
    if best is not None and best.step != last.step:
        lowest = f"; lowest {best.loss:.4f} at step {best.step:,}"
    return f"{loss}{bits} at step {last.step:,}{lowest}"


def _suites(measured: Mapping[str, Any]) -> str:
    """The first metric of each suite."""
    values = []
    for name, metrics in measured["suites"].items():
        metric = next(iter(metrics.values()))
        value = "non-finite" if metric["value"] is None else f"{metric['value']:.3f}"
        chance = f" (chance {metric['chance']:.3f})" if "chance" in metric else ""
        values.append(f"{name} {value}{chance}")
    return f"{', '.join(values)} at step {measured['step']:,}"


def _left(status: Status, now: float) -> str:
    assert status.left_s is not None
    if status.health.state in ("stopped", "dead"):
        return f"{duration(status.left_s)} of training after a resume"
    return f"{duration(status.left_s)}; ends about {_at(now + status.left_s)}"


def _event(line: Mapping[str, Any]) -> str:
    event = line.get("event")
    if event == "start":
        what = (
            f"started at step {line.get('step', 0):,} on {line.get('world_size')} ranks, "
            f"ZeRO {line.get('zero_stage')}"
        )
    elif event == "exit":
        what = f"ended with code {line.get('code')} ({line.get('kind')}): {line.get('reason')}"
    else:
        known = ("event", "time", "host", "job")
        facts = ", ".join(f"{key} {value}" for key, value in line.items() if key not in known)
        what = f"{event} {facts}".strip()
    when = _at(line["time"]) if "time" in line else "-"
    job = "" if line.get("job") is None else f", job {line['job']}"
    return f"{when}  {what} ({line.get('host')}{job})"


def _at(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M")


@click.command(
    cls=Command,
    name="status",
    epilog=examples(
        "megaback status runs/xcoax_100bt",
        "megaback status runs/xcoax_100bt --json",
    ),
)
@click.argument("run", type=click.Path(path_type=Path))
@json_option
def main(run: Path, as_json: bool) -> None:
    """Show the progress, history and expected end of RUN."""
    now = time.time()
    status = status_of(run, now)
    click.echo(json.dumps(asdict(status)) if as_json else fit(screen(status, now)))


if __name__ == "__main__":
    main()
