"""metrics.jsonl: one line a step, canonical; and its mirrors on the console and in wandb.

Every line has `step`, the number of steps completed. On resuming, lines past the resumed step are
cut off, so that the file is that of an uninterrupted run.
"""

import json
import sys
import uuid
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from data_pipeline.command import write_text
from data_pipeline.errors import BackendError
from megaback.config import LoggingSection

METRICS_NAME = "metrics.jsonl"
_WANDB_ID_NAME = "wandb_id.txt"


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics; a last line that a kill cut short is left out."""
    lines: list[dict[str, Any]] = []
    for line in (run / METRICS_NAME).read_text(encoding="utf-8").splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


class MetricsLog:
    """Where a run's numbers go. Only the first rank has one."""

    def __init__(self, run: Path, resumed_step: int, total_steps: int, config: dict[str, Any]):
        path = run / METRICS_NAME
        kept = (
            [line for line in read_metrics(run) if line["step"] <= resumed_step]
            if (path.exists() and resumed_step)
            else []
        )
        write_text(path, "".join(json.dumps(line) + "\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")
        logging = LoggingSection.model_validate(config["logging"])
        self._every_steps = logging.every_steps
        self._wandb = _start_wandb(run, logging, config)
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
        self._total_steps = total_steps

    def say(self, message: str) -> None:
        """Print a line, above the progress bar if there is one."""
        self._console.print(message, highlight=False, markup=False)

    def train(self, line: dict[str, Any], description: str) -> None:
        """Record a training step."""
        self._write(line)
        step = line["step"]
        if self._progress is not None:
            self._progress.update(self._bar, completed=step, description=description)
        elif step % self._every_steps == 0 or step == self._total_steps:
            self.say(f"step {step}/{self._total_steps}  {description}")

    def validation(self, line: dict[str, Any]) -> None:
        """Record a measurement of the whole val set."""
        self._write(line)
        self.say(
            f"step {line['step']}/{self._total_steps}  val loss {line['val_loss']:.4f} nats/token, "
            f"{line['val_bits_per_byte']:.4f} bits/byte over {line['val_targets']:,} tokens"
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


def _start_wandb(run: Path, logging: LoggingSection, config: dict[str, Any]) -> Any:
    """One wandb run across restarts: its id is drawn once and kept in the run's folder."""
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
        config=config,
        settings=wandb.Settings(silent=True),
    )
