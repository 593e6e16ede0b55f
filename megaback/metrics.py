"""metrics.jsonl: one line a step, canonical; and its mirrors on the console and in wandb.

Every line has `step`, the number of steps completed. On resuming, lines past the resumed step are
cut off, so that the file is that of an uninterrupted run.
"""

import json
import math
import sys
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.command import write_text
from data_pipeline.errors import BackendError, CheckpointCorruptError
from megaback.config import Config
from megaback.context_loss import ContextLoss

METRICS_NAME = "metrics.jsonl"
_WANDB_ID_NAME = "wandb_id.txt"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a last line that a kill cut short is left out.

    Raises CheckpointCorruptError for lines that are not of a run.
    """
    lines: list[dict[str, Any]] = []
    path = run / METRICS_NAME
    for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if not isinstance(line, dict) or not isinstance(line.get("step"), int):
            raise CheckpointCorruptError(
                f"{path}:{number} is not of this version of megaback, or damaged; look at the run "
                "with the version that wrote it"
            )
        lines.append(line)
    return lines


@dataclass(frozen=True)
class StepRecord:
    """A training step: loss in nats a target, the norm before clipping, wall-clock seconds."""

    step: int
    loss: float
    targets: int
    learning_rate: float
    gradient_norm: float
    step_s: float
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
    ) -> None:
        """`step_flops_share` is the MFU of a step that takes one second, None if unknown."""
        path = config.run / METRICS_NAME
        kept: list[dict[str, Any]] = []
        if resumed_step and path.exists():
            kept = [line for line in read_metrics(config.run) if line["step"] <= resumed_step]
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        self._step_tokens = config.batch.global_batch_rows * config.batch.context_tokens
        self._step_flops_share = step_flops_share
        self._total_steps = total_steps
        self._every_steps = config.logging.every_steps
        self._wandb = _start_wandb(config)
        self._console = Console(soft_wrap=True)
        self._progress: Progress | None = None
        if sys.stdout.isatty():
            self._progress = Progress(
                TextColumn("{task.completed}/{task.total}"),
                BarColumn(),
                TextColumn("{task.description}"),
                TimeRemainingColumn(),
                console=self._console,
            )
            self._bar = self._progress.add_task("", total=total_steps, completed=resumed_step)
            self._progress.start()

    def say(self, message: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._console.print(message, highlight=False, markup=False)

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
        text = (
            f"loss {record.loss:.4f}  {line['tokens_per_s']:,.0f} tokens/s  "
            f"lr {record.learning_rate:.2e}  norm {record.gradient_norm:.2f}"
        )
        if self._step_flops_share is not None:
            line["mfu"] = self._step_flops_share / record.step_s
            text += f"  MFU {line['mfu']:.1%}"
        self._write(line)
        if record.skipped is not None:
            self.say(f"step {step}/{self._total_steps}  skipped: {record.skipped}")
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, description=text)
        elif step % self._every_steps == 0 or step == self._total_steps:
            left_minutes = (self._total_steps - step) * record.step_s / 60
            self.say(f"step {step}/{self._total_steps}  {text}  {left_minutes:.1f} min left")

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
        if self._wandb is not None:
            self._wandb.finish()

    def _write(self, line: dict[str, Any]) -> None:
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        if self._wandb is not None:
            self._wandb.log(
                {key: value for key, value in line.items() if key != "step"}, line["step"]
            )


def _json_number(value: Any) -> Any:
    """JSON has no NaN and no infinity."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _start_wandb(config: Config) -> Any:
    """One wandb run across restarts: its id is drawn once and kept in the run's folder."""
    run, logging = config.run, config.logging
    if logging.wandb == "off":
        return None
    try:
        import wandb
    except ImportError:
        raise BackendError(
            "logging.wandb is on, but wandb is not installed; "
            "install it with `pip install wandb`, or set logging.wandb=off"
        ) from None
    id_path = run / _WANDB_ID_NAME
    if not id_path.exists():
        write_text(id_path, uuid.uuid4().hex[:12] + "\n")
    return wandb.init(
        project=logging.wandb_project,
        name=run.name,
        id=id_path.read_text(encoding="utf-8").strip(),
        resume="allow",
        mode=logging.wandb,
        dir=run,
        config=config.model_dump(mode="json"),
        settings=wandb.Settings(silent=True),
    )
