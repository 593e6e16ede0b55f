"""Trackers of a run: wandb and TensorBoard, fed from metrics.jsonl.

metrics.jsonl is canonical. On resume, trackers are truncated to the resumed step and backfilled; no
step is logged twice. A tracker that fails is dropped, and training continues.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from operator import itemgetter
from typing import Any

from data_pipeline.common.packages import is_installed
from data_pipeline.errors import BackendError
from data_pipeline.redaction import scrub
from megaback.config import Config
from megaback.tracking.tracker import Tracker, flat_values

_NO_SAMPLES: Mapping[int, Sequence[tuple[str, str]]] = {}
_A_MODULE_OF = {"wandb": "wandb.sdk", "tensorboard": "tensorboard.summary"}
"""Modules that a plain folder of that name, such as one of offline runs, does not have."""


class Trackers:
    """The configured trackers that have not failed."""

    def __init__(self, config: Config, last_step: int, log: Callable[[str], None]) -> None:
        """`last_step`: the last one in metrics.jsonl, or BEFORE_ALL_STEPS.

        Raises BackendError for a tracker that is configured but not installed.
        """
        require_installed(config)
        self._log = log
        self._trackers: dict[str, Tracker] = {}
        for name, start in _STARTS.items():
            try:
                tracker = start(config, last_step)
            except Exception as error:  # noqa: BLE001 (a tracker may raise anything)
                log(_failure(name, "did not start", error))
                continue
            if tracker is None:
                continue
            self._trackers[name] = tracker
            if tracker.held_step > last_step:
                log(
                    f"{name} already has steps up to {tracker.held_step:,}; they are not logged "
                    "there again"
                )

    def feed(
        self,
        lines: Iterable[Mapping[str, Any]],
        samples: Mapping[int, Sequence[tuple[str, str]]] = _NO_SAMPLES,
    ) -> None:
        """Pass lines of metrics.jsonl to the trackers that lack them, with samples by step."""
        left = dict(samples)
        for step, of_step in groupby(lines, key=itemgetter("step")):
            for line in of_step:
                self._pass(step, "write", flat_values(line))
            if step in left:
                self.feed_samples(step, left.pop(step))

    def feed_samples(self, step: int, texts: Sequence[tuple[str, str]]) -> None:
        """Pass the samples of a validation, after the step's line."""
        self._pass(step, "write_samples", texts)

    def _pass(self, step: int, method: str, values: Any) -> None:
        for name, tracker in list(self._trackers.items()):
            if step > tracker.held_step:
                self._attempt(name, getattr(tracker, method), step, values)

    def close(self) -> None:
        for name, tracker in list(self._trackers.items()):
            self._attempt(name, tracker.close)

    def _attempt(self, name: str, act: Callable[..., None], *arguments: Any) -> None:
        try:
            act(*arguments)
        except Exception as error:  # noqa: BLE001 (a tracker may raise anything)
            del self._trackers[name]
            self._log(_failure(name, "has failed", error))


def _failure(name: str, what: str, error: Exception) -> str:
    reason = scrub(" ".join(str(error).split())) or type(error).__name__
    return (
        f"{name} {what} ({type(error).__name__}: {reason}); training continues without it, and the "
        "next start backfills it from metrics.jsonl"
    )


def require_installed(config: Config) -> None:
    """Raises BackendError for a tracker that is configured but not installed."""
    section = config.logging
    for name, value in (("wandb", section.wandb), ("tensorboard", section.tensorboard)):
        if value not in ("off", "auto") and not _is_installed(name):
            otherwise = "off" if name == "wandb" else "auto"
            raise BackendError(
                f"logging.{name} is {value}, but {name} is not installed; "
                f"install it with `pip install {name}`, or set logging.{name}={otherwise}"
            )


def _is_installed(name: str) -> bool:
    return is_installed(_A_MODULE_OF[name])


def _start_wandb(config: Config, last_step: int) -> Tracker | None:
    if config.logging.wandb == "off":
        return None
    from megaback.tracking.wandb_tracker import WandbTracker

    return WandbTracker(config, last_step)


def _start_tensorboard(config: Config, last_step: int) -> Tracker | None:
    if config.logging.tensorboard == "off" or not _is_installed("tensorboard"):
        return None
    from megaback.tracking.tensorboard_tracker import TensorboardTracker

    return TensorboardTracker(config.run, last_step)


_STARTS: dict[str, Callable[[Config, int], Tracker | None]] = {
    "wandb": _start_wandb,
    "TensorBoard": _start_tensorboard,
}
