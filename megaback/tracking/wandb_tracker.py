"""wandb tracker: all starts of a run's folder are one run of wandb, with one id.

Every start is a segment of it. Offline, earlier segments are truncated to the resumed step, as
metrics.jsonl is, unless they have been sent; online, the server reports its last step.
"""

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import wandb

from data_pipeline.common.atomic import new_id, write_text
from data_pipeline.common.regular_files import read_file
from data_pipeline.redaction import scrub
from megaback.config import Config
from megaback.run_folder import WANDB_ID_NAME
from megaback.shown_config import shown_config
from megaback.tracking.code_version import code_version
from megaback.tracking.lineage import lineage
from megaback.tracking.tracker import BEFORE_ALL_STEPS, Value
from megaback.tracking.wandb_log import cut_back, read_segments

_MAX_ID_BYTES = 128


class WandbTracker:
    """Writes steps as rows of wandb's history, numbered by wandb's own `_step`.

    wandb merges the values of one step, and stores them at the next step or on close.
    """

    def __init__(self, config: Config, last_step: int) -> None:
        """Raises any exception of wandb, OSError, and ValueError for files of another kind."""
        run, logging = config.run, config.logging
        is_online = logging.wandb == "online"
        id_path = run / WANDB_ID_NAME
        if not id_path.exists():
            write_text(id_path, new_id() + "\n")
        run_id = read_file(id_path, _MAX_ID_BYTES).decode().strip()
        if not is_online:
            self.held_step = _cut_back(config, run_id, last_step)
        # wandb stores the command line, which is not needed any more.
        sys.argv[1:] = map(scrub, sys.argv[1:])
        self._run: Any = wandb.init(
            project=logging.wandb_project,
            name=run.name,
            id=run_id,
            resume="allow",
            mode="online" if is_online else "offline",
            dir=run,
            config={
                **shown_config(config),
                "code": code_version(),
                "lineage": lineage(config, max(last_step, 0)),
            },
            settings=wandb.Settings(silent=True),
        )
        if is_online:
            self.held_step = self._run.starting_step - 1  # the server's next step

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        with _disconnect_if_lost():
            self._run.log(dict(values), step=step)

    def write_samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        table = wandb.Table(columns=["given", "text"], data=[list(one) for one in texts])
        with _disconnect_if_lost():
            self._run.log({"samples": table}, step=step)

    def close(self) -> None:
        with _disconnect_if_lost():
            self._run.finish()
            with suppress(SystemExit):
                wandb.teardown()  # wandb's process has written everything once it ends


@contextmanager
def _disconnect_if_lost() -> Iterator[None]:
    """If wandb's own process has ended, keep wandb from waiting for it at the end of ours."""
    try:
        yield
    except OSError:
        with suppress(OSError, SystemExit):
            wandb.teardown()
        raise


def _cut_back(config: Config, run_id: str, last_step: int) -> int:
    """Truncate segments that were not sent; the last remaining step, or BEFORE_ALL_STEPS."""
    held = [BEFORE_ALL_STEPS]
    for segment in read_segments(config.run, run_id):
        kept = segment if segment.is_sent else cut_back(segment, last_step)
        held.extend(kept.steps)
    return max(held)
