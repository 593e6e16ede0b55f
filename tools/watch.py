"""`megaback watch`: whether a run is running, slow, stuck or dead, and why.

It only reads the run's folder (heartbeats, metrics, `exit.json`), so it works on any machine that
mounts it.
"""

import json
import statistics
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from data_pipeline.common.command import Command, examples
from data_pipeline.common.number_ranges import WATCH_SECONDS
from data_pipeline.common.shared_options import json_option
from data_pipeline.common.terminal import echo
from data_pipeline.errors import CheckpointMissingError
from megaback.faults.exit_record import read_history
from megaback.faults.heartbeat import read_heartbeats
from megaback.faults.run_state import State, assess_run
from megaback.run_folder import HISTORY_NAME
from megaback.tracking.run_progress import last_metrics, runs_below
from tools.run_views.branch_tree import TreeRun

_NAMED_RUNS = 6
EXIT_CODES: dict[State, int] = {
    "finished": 0,
    "starting": 0,
    "running": 0,
    "stopped": 3,
    "slow": 4,
    "stuck": 5,
    "dead": 6,
}
_RECENT_STEPS = 50
_MIN_TIMED_STEPS = 5
_MIN_LAG_SHARE = 0.05


@dataclass(frozen=True, kw_only=True)
class Health:
    """State of a run now."""

    state: State
    reason: str
    step: int | None
    median_step_s: float | None
    ranks: int
    restarts: int
    slow_rank: str | None = None
    """Rank that was the slowest in most of the last steps, if `logging.rank_times` is set."""


def _slow_rank(steps: Sequence[Mapping[str, Any]]) -> str | None:
    """The slowest rank of most steps, with its median lag; None if it differs, or is little."""
    known = [line for line in steps if line.get("slowest_rank") is not None]
    ranks = Counter(line["slowest_rank"] for line in known)
    if len(known) < _MIN_TIMED_STEPS:
        return None
    rank, count = ranks.most_common(1)[0]
    own = [line for line in known if line["slowest_rank"] == rank]
    lag_s = statistics.median(line.get("forward_lag_s") or 0.0 for line in own)
    forward_s = statistics.median(line.get("slowest_forward_s") or 0.0 for line in own)
    if count <= len(known) / 2 or lag_s < _MIN_LAG_SHARE * forward_s:
        return None
    return (
        f"rank {rank} is the slowest in {count} of {len(known)} steps: its forward passes take "
        f"{forward_s:.3f} s, {lag_s:.3f} s longer than the fastest rank's"
    )


def health_of(run: Path, now: float | None = None) -> Health:
    """The state of a run from its folder. Raises CheckpointMissingError if it is not a run's."""
    now = time.time() if now is None else now
    history = read_history(run)
    if not history:
        below = list(runs_below(run))
        which = "the folder of a run that was started"
        if below:
            more = f" and {len(below) - _NAMED_RUNS} more" if len(below) > _NAMED_RUNS else ""
            which = f"one of {', '.join(map(str, below[:_NAMED_RUNS]))}{more}"
        raise CheckpointMissingError(
            f"{run} is not a run's folder (no {HISTORY_NAME}); give {which}"
        )
    beats = read_heartbeats(run)
    steps = last_metrics(run)
    times = [line["step_s"] for line in steps if line.get("step_s") is not None]
    times = times[-_RECENT_STEPS:]
    assessed = assess_run(run, times, now)
    step = max((beat.step for beat in beats), default=None)
    if assessed.has_ended and steps:  # heartbeats may be of a step that was never completed
        step = steps[-1]["step"]
    if assessed.rolled_back_to is not None:
        step = assessed.rolled_back_to
    return Health(
        state=assessed.state,
        reason=assessed.reason,
        step=step,
        median_step_s=statistics.median(times) if times else None,
        ranks=len(beats),
        restarts=sum(line.get("event") == "start" for line in history) - 1,
        slow_rank=_slow_rank(steps[-_RECENT_STEPS:]),
    )


def branch_states(run: Path) -> dict[str, State]:
    """State of each branch below a run, by its path from there."""
    _, *branches = TreeRun(run).with_branches()
    return {str(one.path.relative_to(run)): health_of(one.path).state for one in branches}


@click.command(
    cls=Command,
    name="watch",
    epilog=examples(
        "megaback watch runs/xcoax_100bt",
        "megaback watch runs/xcoax_100bt --every 60 --json",
    ),
)
@click.argument("run", type=click.Path(path_type=Path))
@click.option(
    "--every",
    "every_s",
    type=WATCH_SECONDS.option,
    help="Interval between reports, in seconds. Default: one report.",
)
@json_option
def main(run: Path, every_s: float | None, as_json: bool) -> None:
    """Report whether RUN is finished, stopped, starting, running, slow, stuck or dead, and why.

    The exit code is 0 for a healthy or finished run, 3 for stopped, 4 for slow, 5 for stuck and 6
    for dead, whatever the state of its branches. With --every, reports repeat until the run ends;
    --json prints one object per report.
    """
    while True:
        health, branches = health_of(run), branch_states(run)
        if as_json:
            click.echo(json.dumps({**asdict(health), "branches": branches}))
        else:
            restarts = f", {health.restarts} restarts" if health.restarts else ""
            pace = f", {health.median_step_s:.3f} s/step" if health.median_step_s else ""
            slow = f"; {health.slow_rank}" if health.slow_rank else ""
            counts = Counter(branches.values())
            below = ", ".join(f"{count} {state}" for state, count in counts.items())
            line = f"{health.state}: step {health.step}{pace}{restarts}; {health.reason}{slow}"
            echo(line + (f"; branches: {below}" if below else ""))
        if every_s is None or health.state in ("finished", "stopped", "dead"):
            raise SystemExit(EXIT_CODES[health.state])
        time.sleep(every_s)


if __name__ == "__main__":
    main()
