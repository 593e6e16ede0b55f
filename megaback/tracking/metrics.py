"""metrics.jsonl: one line a step, canonical; what the console shows of it; and its mirrors.

Every line has `step`, the number of steps completed. On resuming, lines past the resumed step are
cut off, so that the file is that of an uninterrupted run. docs/metrics.md says what each field is.
"""

import json
import math
import statistics
import sys
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.table import Column

from data_pipeline.common.checked_json import parse_json
from data_pipeline.common.command import write_text
from data_pipeline.common.console import console_losses
from data_pipeline.common.durations import duration
from data_pipeline.common.regular_files import UNFIT
from data_pipeline.common.rich_console import SafeConsole, SafeProgress
from data_pipeline.errors import CheckpointCorruptError
from megaback.config import Config
from megaback.faults.exit_record import record_event
from megaback.faults.run_records import Fields, lines_of
from megaback.tracking.loss_by_context import ContextLoss
from megaback.tracking.trackers import BEFORE_ALL_STEPS, Mirrors

METRICS_NAME = "metrics.jsonl"
MACHINE_FIELDS = frozenset(
    {
        "step_s",
        "tokens_per_s",
        "tokens_per_s_per_device",
        "mfu",
        "data_wait_share",
        "memory_peak_bytes",
    }
)
"""What says how fast a machine was, not what was learnt: it differs between equal runs."""
_FIELDS = Fields(
    counts=frozenset(
        ("step", "targets", "tokens_seen", "memory_peak_bytes", "skipped_rows", "val_targets")
    ),
    numbers=MACHINE_FIELDS.difference(("memory_peak_bytes",))
    | {"loss", "learning_rate", "gradient_norm", "val_loss", "val_bits_per_byte", "bits_per_byte"},
    texts=frozenset(("skipped",)),
)
_MAX_LINES = 2_000_000
"""Of the shortest, 1 GB of memory."""
_RECENT_STEPS = 50
"""Whose pace tells how much time is left."""
LEAST_DATA_WAIT_SHARE = 0.01
"""Below, nobody is told of it but metrics.jsonl."""


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a last line that a kill cut short is left out.

    Raises CheckpointCorruptError for lines that are not of a run.
    """
    lines: list[dict[str, Any]] = []
    path = run / METRICS_NAME
    try:
        for number, text in enumerate(lines_of(path), start=1):
            line = parsed_line(text)
            if line is None:
                break
            if not line:
                raise ValueError(f"line {number} is none of a run's")
            if number > _MAX_LINES:
                raise ValueError(f"it has more than {_MAX_LINES:,} lines")
            lines.append(line)
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno not in UNFIT:
            raise
        raise CheckpointCorruptError(
            f"{path} is not of this version of megaback, or damaged ({error}); look at the run "
            "with the version that wrote it"
        ) from None
    return lines


def parsed_line(text: bytes) -> dict[str, Any] | None:
    """A line of metrics; an empty one for what is none of a run's, None for what is no JSON."""
    try:
        line = parse_json(text)
    except ValueError:
        return None
    if not isinstance(line, dict) or type(line.get("step")) is not int:
        return {}
    by_context = line.get("val_by_context", {})
    if not isinstance(by_context, dict):
        return {}
    parts = [line, *by_context.values()]
    are_known = all(isinstance(part, dict) and _FIELDS.problem(part) is None for part in parts)
    return line if are_known else {}


@dataclass(frozen=True)
class StepRecord:
    """A training step: loss in nats a target, the norm before clipping, wall-clock seconds."""

    step: int
    loss: float
    targets: int
    learning_rate: float
    gradient_norm: float
    step_s: float
    data_wait_share: float
    """Of these seconds, what the rank that waited longest for its rows waited."""
    memory_peak_bytes: int
    """Since the start, of the rank with most: of its GPU's allocator, or resident on a CPU."""
    skipped_rows: int = 0
    """Rows of frames that could not be read."""
    skipped: str | None = None
    """Why the step changed no weights, if it did not."""


class MetricsLog:
    """Where a run's numbers go. Only the first rank has one."""

    def __init__(
        self,
        config: Config,
        resumed_step: int,
        total_steps: int,
        step_flops_share: float | None,
        num_devices: int,
    ) -> None:
        """`step_flops_share` is the MFU of a step that takes one second, None if unknown.

        Raises BackendError for a mirror that was asked for and is not installed, OSError, and
        CheckpointCorruptError for lines that are not of a run.
        """
        path = config.run / METRICS_NAME
        kept: list[dict[str, Any]] = []
        if resumed_step and path.exists():
            kept = [line for line in read_metrics(config.run) if line["step"] <= resumed_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._step_tokens = config.batch.global_batch_rows * config.batch.context_tokens
        self._num_devices = num_devices
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._step_flops_share = step_flops_share
        self._total_steps = total_steps
        self._every_steps = config.logging.every_steps
        self._console = SafeConsole(soft_wrap=True)
        self._run = config.run
        self._noted_losses: set[str] = set()
        self._mirrors = Mirrors(config, resumed_step or BEFORE_ALL_STEPS, self.say)
        self._mirrors.feed(kept)
        self._progress: SafeProgress | None = None
        if sys.stdout.isatty():
            self._progress = SafeProgress(
                # Where there is not room for all, first the bar goes, then the end of the text.
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                console=self._console,
            )
            self._bar = self._progress.add_task("", total=total_steps, completed=resumed_step)
            self._progress.start()

    def say(self, message: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._console.print(message, highlight=False)

    def train(self, record: StepRecord) -> None:
        """Record a training step."""
        step = record.step
        line = {name: _json_number(value) for name, value in asdict(record).items()}
        if not record.skipped_rows:
            del line["skipped_rows"]
        if record.skipped is None:
            del line["skipped"]
        line["tokens_seen"] = step * self._step_tokens
        line["tokens_per_s"] = self._step_tokens / record.step_s
        line["tokens_per_s_per_device"] = line["tokens_per_s"] / self._num_devices
        if self._step_flops_share is not None:
            line["mfu"] = self._step_flops_share / record.step_s
        text = self._summary(record, line)
        self._write(line)
        if record.skipped is not None:
            self.say(f"step {step}/{self._total_steps}  skipped: {record.skipped}")
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, description=text)
        elif step % self._every_steps == 0 or step == self._total_steps:
            self.say(f"step {text}")
        self._note_losses(step)

    def left_out(self, step: int) -> None:
        """Record a step that was passed over."""
        self._write({"step": step, "left_out": True})

    def validation(self, step: int, measured: ContextLoss) -> None:
        """Record a measurement of the whole val set."""
        whole = measured.whole
        self._write(
            {
                "step": step,
                "val_loss": _json_number(whole.nats_per_token),
                "val_bits_per_byte": _json_number(whole.bits_per_byte),
                "val_targets": whole.num_targets,
                "val_by_context": {
                    name: {
                        "loss": _json_number(one.nats_per_token),
                        "bits_per_byte": _json_number(one.bits_per_byte),
                        "targets": one.num_targets,
                    }
                    for name, one in measured.by_context.items()
                },
            }
        )
        self.say(
            f"step {step}/{self._total_steps}  val loss {whole.nats_per_token:.4f} nats/token, "
            f"{whole.bits_per_byte or 0:.4f} bits/byte over {whole.num_targets:,} tokens"
        )

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._file.close()
        self._mirrors.close()

    def _summary(self, record: StepRecord, line: dict[str, Any]) -> str:
        """A step on the console: what is asked for most comes first."""
        self._recent_s.append(record.step_s)
        left_s = (self._total_steps - record.step) * statistics.fmean(self._recent_s)
        pace = f"{line['tokens_per_s']:,.0f} tokens/s"
        if self._num_devices > 1:
            pace += f" ({line['tokens_per_s_per_device']:,.0f} a device)"
        parts = [
            f"{record.step}/{self._total_steps}",
            f"loss {record.loss:.4f}",
            f"{duration(left_s)} left",
            pace,
            f"lr {record.learning_rate:.2e}",
            f"norm {record.gradient_norm:.2f}",
        ]
        if "mfu" in line:
            parts.append(f"MFU {line['mfu']:.1%}")
        parts.append(f"{record.memory_peak_bytes / 1e9:.1f} GB")
        if record.data_wait_share > LEAST_DATA_WAIT_SHARE:
            parts.append(f"data wait {record.data_wait_share:.0%}")
        return "  ".join(parts)

    def _note_losses(self, step: int) -> None:
        """Note in the run's history what can no longer be printed to: nobody sees it there."""
        losses = console_losses()
        for name in losses.keys() - self._noted_losses:
            self._noted_losses.add(name)
            record_event(self._run, "console lost", stream=name, reason=losses[name], step=step)

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._mirrors.feed([line])


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
