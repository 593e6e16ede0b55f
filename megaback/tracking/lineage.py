"""Lineage of a run's weights: its base, the checkpoint that it resumed from, its starts."""

from dataclasses import asdict
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
    base = None if config.init_from is None else description_of(config.init_from)
    checkpoint = config.run / CHECKPOINTS_FOLDER / step_name(start_step) / META_NAME
    return {
        "base": None if base is None else asdict(identity_of(base)),
        "trunk": next((line["branch"] for line in reversed(started) if "branch" in line), None),
        "checkpoint": asdict(identity_of(checkpoint)) if start_step else None,
        "restarts": max(len(started) - 1, 0),
        "starts": [{key: line.get(key) for key in ("step", "time")} for line in started],
    }
