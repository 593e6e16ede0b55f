"""State of a run: its recorded end or, without one, the health of its ranks by their heartbeats.

`watch`, `status`, `jobs` and `inspect` all use it, so that they agree. Loads no torch.
"""

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_pipeline.errors import RankLostError
from megaback.faults.collective_record import describe_hang, read_collectives
from megaback.faults.exit_record import START_EVENT, read_exit, read_history
from megaback.faults.heartbeat import Heartbeat, missing_ranks, read_heartbeats

State = Literal["finished", "stopped", "starting", "running", "slow", "stuck", "dead"]
ROLLBACK_EVENT = "rollback"
_SLOW_RATIO = 3.0
_SHOWN_MISSING = 4


@dataclass(frozen=True)
class RunState:
    """State of a run and the reason for it."""

    state: State
    reason: str
    ending: str | None = None
    """Recorded reason of the end."""
    code: int | None = None
    """Recorded exit code of the newest start."""
    rolled_back_to: int | None = None
    """Step of a rollback, if nothing has started since."""

    @property
    def has_ended(self) -> bool:
        return self.state in ("finished", "stopped")


def assess_run(run: Path, step_times_s: Sequence[float], now: float) -> RunState:
    """Assess a run by its folder; `step_times_s` are those of its last steps."""
    ended = _ended(run, read_history(run))
    return ended or _assess_ranks(read_heartbeats(run), step_times_s, now)


def _ended(run: Path, history: Sequence[dict[str, Any]]) -> RunState | None:
    """State of a run that has ended or was rolled back, and has not started since."""
    starts = [line.get("start") for line in history if line.get("event") == START_EVENT]
    # A rank of an earlier start may live on for a moment.
    current = (None, starts[-1] if starts else None)
    ending = read_exit(run)
    if ending is not None and ending.get("start") not in current:
        ending = None
    events = (START_EVENT, "exit", ROLLBACK_EVENT)
    past = [
        line
        for line in history
        if line.get("event") in events
        and (line.get("event") != "exit" or line.get("start") in current)
    ]
    last = past[-1] if past else {}
    if last.get("event") == ROLLBACK_EVENT:
        step = last.get("step", 0)
        reason = f"rolled back to step {step}; `megaback train` resumes it there"
        return RunState("stopped", reason, reason, rolled_back_to=step)
    if last.get("event") == "exit" and (ending is None or ending.get("code") != last.get("code")):
        ending = last  # exit.json could not be written
    if ending is None or "code" not in ending:
        return None
    code = ending["code"]
    why = str(ending.get("reason"))
    reason = f"exit code {code} ({ending.get('kind')}): {why}"
    if code == RankLostError.exit_code:
        hang = describe_hang(read_collectives(run, ending.get("start")))
        reason += f"; {hang}" if hang is not None else ""
    return RunState("finished" if code == 0 else "stopped", reason, why, code)


def _assess_ranks(
    beats: Sequence[Heartbeat], step_times_s: Sequence[float], now: float
) -> RunState:
    world_size = max((beat.world_size for beat in beats), default=1)
    missing = missing_ranks(beats, range(world_size), now)
    if missing:
        shown = list(missing.values())[:_SHOWN_MISSING]
        more = [f"and {len(missing) - len(shown):,} more"] if len(missing) > len(shown) else []
        return RunState("dead", "; ".join([*shown, *more]))
    # The others wait for the rank at the earliest step, or longest in its phase.
    last = min(beats, key=lambda beat: (beat.step, beat.since))
    here_s = now - last.since
    where = _last_report(last, now)
    if here_s > last.timeout_s:
        return RunState("stuck", f"{where}; its timeout is {last.timeout_s:.0f} s")
    if not step_times_s:
        return RunState("starting", where)
    usual_s = statistics.median(step_times_s)
    if here_s > max(_SLOW_RATIO * usual_s, 2 * last.interval_s):
        return RunState("slow", f"{where}; the median step takes {usual_s:.2f} s")
    if step_times_s[-1] > _SLOW_RATIO * usual_s:
        took = f"the last step took {step_times_s[-1]:.2f} s, the median step {usual_s:.2f} s"
        return RunState("slow", took)
    return RunState("running", f"{len(beats)} ranks; {where}")


def _last_report(beat: Heartbeat, now: float) -> str:
    """Phase of a rank, and the age of the heartbeat that has it."""
    age_s = now - beat.written
    age = f"heartbeat {age_s:.0f} s old"
    if age_s < -1:
        age = f"heartbeat {-age_s:.0f} s in the future: the clock of {beat.host} is ahead"
    return (
        f"{beat.name}: {beat.phase} at step {beat.step} for {max(now - beat.since, 0):.0f} s, {age}"
    )
