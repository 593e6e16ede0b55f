"""Runs of a sweep as training leaves them, without training."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from data_pipeline.errors import NonFiniteError, PreemptedError
from megaback.config_file import load_config
from megaback.faults.exit_record import record_exit, record_start
from megaback.run_folder import METRICS_NAME

STEPS = 4
_KINDS = {0: "finished", 50: NonFiniteError.__name__, 75: PreemptedError.__name__}


def write_run(run: Path, *losses: float | None, code: int = 0, **last_step: Any) -> Path:
    """A run's folder after its end, with a validation per loss; none: only training losses of 5.

    `last_step`: fields of the last step.
    """
    run.mkdir(parents=True, exist_ok=True)
    record_start(run, step=0, total_steps=STEPS, world_size=1, zero_stage=0)
    record_exit(run, code, _KINDS.get(code, "LaunchError"), "its reason", 0)
    lines: list[dict[str, Any]] = [
        {
            "step": step,
            "loss": 5.0,
            "learning_rate": 0.1,
            "step_s": 0.5,
            "tokens_seen": step,
            "tokens_per_s": 2,
            **(last_step if step == STEPS else {}),
        }
        for step in range(1, STEPS + 1)
    ]
    for number, loss in enumerate(losses):
        step = STEPS - len(losses) + 1 + number
        lines.append({"step": step, "val_loss": loss, "val_bits_per_byte": None})
    (run / METRICS_NAME).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


class FakeTrain:
    """Stand-in for `launcher.train.train` that writes the folder of a run that has ended."""

    def __init__(self, loss_of: Callable[[float, int], float]) -> None:
        """`loss_of`: val loss by learning rate and seed."""
        self.loss_of = loss_of
        self.codes: dict[str, int] = {}
        """Exit code by name of the run, if not 0."""
        self.started: list[str] = []
        """Names of the runs, in order."""

    def __call__(self, config: Path, overrides: tuple[str, ...], *_more: object) -> int:
        settings = load_config(config, overrides)
        self.started.append(settings.run.name)
        code = self.codes.get(settings.run.name, 0)
        loss = self.loss_of(settings.optimizer.learning_rate, settings.training.seed)
        write_run(settings.run, *([] if code else [loss]), code=code)
        return code
