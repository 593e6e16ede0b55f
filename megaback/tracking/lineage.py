"""Lineage of a run's weights: its base, the checkpoint that it resumed from, its starts."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from megaback.config import Config
from megaback.faults.exit_record import read_history
from megaback.run_folder import CHECKPOINTS_FOLDER, META_NAME, step_name
from megaback.weights.identity import description_of, identity_of


def lineage(config: Config, start_step: int) -> dict[str, Any]:
    """`base`, `trunk`, `checkpoint` (None if there is none), `restarts`, `starts` of a run.

    `trunk` is the checkpoint that a branch continues, with what is `kept` of it.

    The base and the checkpoint are given as in `WeightsIdentity`.
    """
    started = [line for line in read_history(config.run) if line.get("event") == "start"]
    base = None if config.init_from is None else _recorded(started, "base")
    if base is None and isinstance(config.init_from, Path):  # a run of an earlier version
        base = asdict(identity_of(description_of(config.init_from)))
    checkpoint = config.run / CHECKPOINTS_FOLDER / step_name(start_step) / META_NAME
    return {
        "base": base,
        "trunk": _recorded(started, "branch"),
        "checkpoint": asdict(identity_of(checkpoint)) if start_step else None,
        "restarts": max(len(started) - 1, 0),
        "starts": [{key: line.get(key) for key in ("step", "time")} for line in started],
    }


def _recorded(started: list[dict[str, Any]], key: str) -> Any:
    """A key of the newest start that recorded it; None if none did."""
    return next((line[key] for line in reversed(started) if key in line), None)
