"""metrics.jsonl, the canonical metrics of a run: its lines, and their reader.

Every line has `step`, the number of completed steps; docs/metrics.md describes each field.
`metrics_log` writes them.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.common.checked_json import parse_json
from data_pipeline.common.regular_files import UNFIT
from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError
from data_pipeline.text.codec import Direction
from megaback.faults.run_records import Fields, lines_of
from megaback.run_folder import METRICS_NAME

MACHINE_FIELDS = frozenset(
    {
        "step_s",
        "tokens_per_s",
        "tokens_per_s_per_device",
        "mfu",
        "data_wait_share",
        "memory_peak_bytes",
        "slowest_rank",
        "slowest_forward_s",
        "forward_lag_s",
        "sample_s",
        "suite_s",
    }
)
"""Fields that depend on the machine's speed: they differ between equal runs."""
_FIELDS = Fields(
    counts=frozenset(
        (
            "step",
            "targets",
            "tokens_seen",
            "memory_peak_bytes",
            "skipped_rows",
            "val_targets",
            "slowest_rank",
            "rows",
        )
    ),
    numbers=MACHINE_FIELDS.difference(("memory_peak_bytes", "slowest_rank"))
    | {"loss", "learning_rate", "gradient_norm", "val_loss", "val_bits_per_byte", "bits_per_byte"}
    | {"value", "low", "high", "chance"},
    texts=frozenset(("skipped", "suites_sha256")),
)
_TABLES = ("val_by_context", "val_by_direction", "by_direction", "by_data_set")
"""Fields whose values are tables of parts of the line's targets or rows."""
_MAX_LINES = 2_000_000
"""The shortest lines take 1 GB of memory at this number."""
MIN_DATA_WAIT_SHARE = 0.01
"""Smaller shares are recorded but not shown."""


def read_metrics(run: str | Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics, by their fields; a truncated last line is skipped.

    Raises CheckpointMissingError for a folder without metrics, and CheckpointCorruptError for lines
    that are not of a run.
    """
    lines: list[dict[str, Any]] = []
    path = Path(run) / METRICS_NAME
    try:
        for number, text in enumerate(lines_of(path), start=1):
            line = parsed_line(text)
            if line is None:
                break
            if not line:
                raise ValueError(f"line {number} is not a line of metrics")
            if number > _MAX_LINES:
                raise ValueError(f"it has more than {_MAX_LINES:,} lines")
            lines.append(line)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
        raise CheckpointMissingError(
            f"{run} has no metrics (no {METRICS_NAME}); give the folder of a run that was started"
        ) from None
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in UNFIT:
            raise
        raise CheckpointCorruptError(
            f"{path} is not of this version of megaback, or damaged ({error}); look at the run "
            "with the version that wrote it"
        ) from None
    return lines


def parsed_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics; empty if its fields are invalid, None if it is not JSON."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int or "left_out" in line:
        return {}  # earlier versions wrote `left_out` instead of `excluded`
    tables, suites = [line.get(name, {}) for name in _TABLES], line.get("suites", {})
    if not all(isinstance(one, dict) for one in (*tables, suites)):
        return {}
    if not all(isinstance(one, dict) for one in suites.values()):
        return {}
    metrics = [metric for suite in suites.values() for metric in suite.values()]
    parts = [line, *(part for table in tables for part in table.values()), *metrics]
    are_known = all(isinstance(part, dict) and _FIELDS.problem(part) is None for part in parts)
    return line if are_known else {}


@dataclass(frozen=True)
class RankTimes:
    """Own forward passes of the ranks in the step before, in seconds."""

    slowest_rank: int
    slowest_forward_s: float
    forward_lag_s: float
    """Difference to the fastest rank."""


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """A training step: loss in nats per target, the norm before clipping, wall-clock seconds."""

    step: int
    loss: float
    targets: int
    learning_rate: float
    gradient_norm: float
    step_s: float
    data_wait_share: float
    """Share of `step_s` spent waiting for rows, on the rank that waited longest."""
    memory_peak_bytes: int
    """Peak memory since the start on the rank with the highest: of its GPU's allocator, or resident
    on a CPU."""
    skipped_rows: int = 0
    """Number of rows of unreadable frames."""
    skipped: str | None = None
    """Reason why the step was skipped, if it was."""
    by_direction: dict[str, dict[str, float | None]] | None = None
    """Loss and targets of each direction, of a model of both."""
    by_data_set: dict[str, dict[str, int]] | None = None
    """Rows of each data set, of a mixture that changes over training."""
    rank_times: RankTimes | None = None
    """Slowest rank, if `logging.rank_times` asks for it."""


def losses_apart(losses: Mapping[str, float | None]) -> str:
    """Losses of each direction, to be shown after the whole one; empty for one direction."""
    shown = [f"{name} {loss:.4f}" for name, loss in losses.items() if loss is not None]
    return f" ({', '.join(shown)})" if shown else ""


def by_direction(
    nats: float, targets: int, forward_nats: float, forward_targets: int
) -> dict[str, dict[str, float | None]]:
    """Loss and targets of each direction of a step, from those of all rows and of forward ones."""
    parts = {
        Direction.BACKWARD: (nats - forward_nats, targets - forward_targets),
        Direction.FORWARD: (forward_nats, forward_targets),
    }
    return {
        direction.value: {"loss": sum_nats / count if count else None, "targets": count}
        for direction, (sum_nats, count) in parts.items()
    }
