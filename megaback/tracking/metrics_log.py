"""Logging of a run's metrics to metrics.jsonl, the console and the trackers.

On resume, lines after the resumed step are removed, so that the file is that of an uninterrupted
run.
"""

import json
import math
import statistics
import sys
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.progress import BarColumn, TextColumn
from rich.table import Column

from data_pipeline.common.atomic import write_text
from data_pipeline.common.console import console_losses
from data_pipeline.common.durations import duration
from data_pipeline.common.rich_console import SafeConsole, SafeProgress
from megaback.branches import BranchPoint
from megaback.config import Config
from megaback.faults.exit_record import record_event
from megaback.faults.start_fence import NO_FENCE, Fence
from megaback.run_folder import METRICS_NAME
from megaback.tracking.loss_by_context import ContextLoss, Loss
from megaback.tracking.metrics import (
    MIN_DATA_WAIT_SHARE,
    StepRecord,
    losses_apart,
    read_metrics,
)
from megaback.tracking.samples_log import SamplesLog
from megaback.tracking.tracker import BEFORE_ALL_STEPS
from megaback.tracking.trackers import Trackers

_SHOWN_CHARACTERS = 200
"""Characters of a sample on the console."""
_RECENT_STEPS = 50
"""Number of steps from whose durations the time left is estimated."""


class MetricsLog:
    """Writer of a run's metrics. Only the first rank has one."""

    def __init__(
        self,
        config: Config,
        resumed_step: int,
        total_steps: int,
        step_flops_share: float | None,
        num_devices: int,
        fence: Fence = NO_FENCE,
        branch: BranchPoint | None = None,
    ) -> None:
        """`step_flops_share` is the MFU of a step that takes one second, None if unknown.

        Raises BackendError for a tracker that is configured but not installed, OSError, and
        CheckpointCorruptError for invalid lines.
        """
        path = config.run / METRICS_NAME
        kept: list[dict[str, Any]] = []
        if resumed_step and path.exists():
            kept = [line for line in read_metrics(config.run) if line["step"] <= resumed_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept), fence.replace)
        self._samples = SamplesLog(config.run, resumed_step, fence)
        self._fence = fence
        self._file = path.open("a", encoding="utf-8")
        self._step_tokens = config.batch.global_batch_rows * config.batch.context_tokens
        self._branch = branch
        self._num_devices = num_devices
        self._recent_s: deque[float] = deque(maxlen=_RECENT_STEPS)
        self._step_flops_share = step_flops_share
        self._total_steps = total_steps
        self._every_steps = config.logging.every_steps
        self._console = SafeConsole(soft_wrap=True)
        self._run = config.run
        self._noted_losses: set[str] = set()
        self._trackers = Trackers(config, resumed_step or BEFORE_ALL_STEPS, self.message)
        self._trackers.feed(kept, self._samples.kept)
        self._progress: SafeProgress | None = None
        if sys.stdout.isatty():
            self._progress = SafeProgress(
                # On a narrow terminal, first the bar is dropped, then the end of the text.
                BarColumn(bar_width=20),
                TextColumn("{task.description}", markup=False, table_column=Column(no_wrap=True)),
                console=self._console,
            )
            self._bar = self._progress.add_task("", total=total_steps, completed=resumed_step)
            self._progress.start()

    def message(self, message: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._console.print(message, highlight=False)

    def train(self, record: StepRecord) -> None:
        """Record a training step."""
        step = record.step
        line = {name: _json_number(value) for name, value in asdict(record).items()}
        if not record.skipped_rows:
            del line["skipped_rows"]
        for name in ("skipped", "by_direction", "by_data_set"):
            if line[name] is None:
                del line[name]
        if record.by_direction is not None:
            line["by_direction"] = _json_numbers(record.by_direction)
        line |= line.pop("rank_times") or {}
        line["tokens_seen"] = (
            step * self._step_tokens
            if self._branch is None
            else self._branch.tokens_at(step, self._step_tokens)
        )
        line["tokens_per_s"] = self._step_tokens / record.step_s
        line["tokens_per_s_per_device"] = line["tokens_per_s"] / self._num_devices
        if self._step_flops_share is not None:
            line["mfu"] = self._step_flops_share / record.step_s
        text = self._summary(record, line)
        self._write(line)
        if record.skipped is not None:
            self.message(f"step {step}/{self._total_steps}  skipped: {record.skipped}")
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, description=text)
        elif step % self._every_steps == 0 or step == self._total_steps:
            self.message(f"step {text}")
        self._note_losses(step)

    def excluded(self, step: int) -> None:
        """Record a step that a rollback excluded."""
        self._write({"step": step, "excluded": True})

    def validation(self, step: int, measured: ContextLoss, sample_s: float | None = None) -> None:
        """Record a validation, of which writing samples took `sample_s`."""
        whole, directions = measured.whole, measured.by_direction
        timing = {} if sample_s is None else {"sample_s": sample_s}
        self._write(
            {
                "step": step,
                "val_loss": _json_number(whole.nats_per_token),
                "val_bits_per_byte": _json_number(whole.bits_per_byte),
                "val_targets": whole.num_targets,
                "val_by_context": _table(measured.by_context),
            }
            | ({"val_by_direction": _table(directions)} if directions else {})
            | timing
        )
        self.message(
            f"step {step}/{self._total_steps}  val loss {whole.nats_per_token:.4f} nats/token"
            f"{losses_apart({name: one.nats_per_token for name, one in directions.items()})}, "
            f"{whole.bits_per_byte or 0:.4f} bits/byte over {whole.num_targets:,} tokens"
        )

    def samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Record samples: each given text, and the text with what was written."""
        self._samples.write(step, texts)
        self._trackers.feed_samples(step, texts)
        for given, text in texts:
            line = " ".join(text.split())
            if len(line) > _SHOWN_CHARACTERS:
                is_ending = text.endswith(given)
                line = f"…{line[-_SHOWN_CHARACTERS:]}" if is_ending else line[:_SHOWN_CHARACTERS]
            self.message(f"step {step}/{self._total_steps}  sample: {line}")

    def suites(
        self,
        step: int,
        results: Mapping[str, Mapping[str, Mapping[str, float | None]]],
        sha256: str,
        suite_s: float,
    ) -> None:
        """Record metrics of suites by name, each with `value`, `low`, `high`, `rows` and perhaps
        `chance`; `sha256` is that of their rows, and they took `suite_s`."""
        fields = {
            suite: {
                name: {key: _json_number(value) for key, value in metric.items()}
                for name, metric in metrics.items()
            }
            for suite, metrics in results.items()
        }
        line = {"step": step, "suites": fields, "suites_sha256": sha256, "suite_s": suite_s}
        self._write(line)
        for suite, metrics in results.items():
            values = ", ".join(f"{name} {_with_interval(one)}" for name, one in metrics.items())
            first = next(iter(metrics.values()))
            chance = f"chance {first['chance']:.3f}, " if first.get("chance") is not None else ""
            self.message(
                f"step {step}/{self._total_steps}  {suite}: {values}; {chance}"
                f"{first['rows']:,} rows"
            )

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        self._fence.check()
        self._file.close()
        self._trackers.close()

    def _summary(self, record: StepRecord, line: dict[str, Any]) -> str:
        """A step on the console, the most wanted figures first."""
        self._recent_s.append(record.step_s)
        left_s = (self._total_steps - record.step) * statistics.fmean(self._recent_s)
        pace = f"{line['tokens_per_s']:,.0f} tokens/s"
        if self._num_devices > 1:
            pace += f" ({line['tokens_per_s_per_device']:,.0f} per device)"
        losses = {name: part["loss"] for name, part in (record.by_direction or {}).items()}
        parts = [
            f"{record.step}/{self._total_steps}",
            f"loss {record.loss:.4f}{losses_apart(losses)}",
            f"{duration(left_s)} left",
            pace,
            f"lr {record.learning_rate:.2e}",
            f"norm {record.gradient_norm:.2f}",
        ]
        if "mfu" in line:
            parts.append(f"MFU {line['mfu']:.1%}")
        parts.append(f"{record.memory_peak_bytes / 1e9:.1f} GB")
        if record.data_wait_share > MIN_DATA_WAIT_SHARE:
            parts.append(f"data wait {record.data_wait_share:.0%}")
        return "  ".join(parts)

    def _note_losses(self, step: int) -> None:
        """Record in the run's history which output streams are lost."""
        losses = console_losses()
        for name in losses.keys() - self._noted_losses:
            self._noted_losses.add(name)
            self._fence.check()
            record_event(self._run, "console lost", stream=name, reason=losses[name], step=step)

    def _write(self, line: dict[str, Any]) -> None:
        self._fence.check()
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._trackers.feed([line])


def _with_interval(metric: Mapping[str, float | None]) -> str:
    """A value, and its 95% interval if there is one."""
    low, high = metric["low"], metric["high"]
    between = "" if low is None or high is None else f" ({low:.3f} to {high:.3f})"
    return f"{metric['value']:.3f}{between}"


def _table(parts: Mapping[str, Loss]) -> dict[str, dict[str, Any]]:
    return {
        name: {
            "loss": _json_number(one.nats_per_token),
            "bits_per_byte": _json_number(one.bits_per_byte),
            "targets": one.num_targets,
        }
        for name, one in parts.items()
    }


def _json_numbers(table: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    return {name: {k: _json_number(v) for k, v in part.items()} for name, part in table.items()}


def _json_number(value: Any) -> Any:
    """The value, or None if it is non-finite, which JSON cannot express."""
    return None if isinstance(value, float) and not math.isfinite(value) else value
