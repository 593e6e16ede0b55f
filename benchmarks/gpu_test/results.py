"""Results of a part: one line of JSON per check, so that a part that is killed keeps them."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

Status = Literal["passed", "failed", "skipped", "measured"]
Figure = float | int | str | None


@dataclass(frozen=True, kw_only=True)
class Check:
    """One thing that was checked, measured or skipped."""

    name: str
    status: Status
    detail: str = ""
    """Bound of what passed, reason of what did not."""
    claim: str | None = None
    """Start of the line of docs/unverified.md that it is about."""
    figures: dict[str, Figure] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class PartResult:
    """All checks of a part, and how its process ended."""

    name: str
    title: str
    device: str
    """Type of device that it ran on."""
    seconds: float
    status: Status
    detail: str = ""
    """Reason why it ended early, or why it did not start."""
    checks: tuple[Check, ...] = ()

    def as_fields(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def of_fields(cls, fields: dict[str, Any]) -> "PartResult":
        checks = tuple(Check(**check) for check in fields.pop("checks"))
        return cls(**fields, checks=checks)


def status_of(checks: Sequence[Check], problem: str) -> Status:
    """Status of a part with these checks. `problem`: what ended it early, if anything did."""
    statuses = {check.status for check in checks}
    if problem or "failed" in statuses or not checks:
        return "failed"
    if "passed" in statuses:
        return "passed"
    return "measured" if "measured" in statuses else "skipped"


def append_check(path: Path, check: Check) -> None:
    """Add a check to a part's file."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(check)) + "\n")


def read_checks(path: Path) -> tuple[Check, ...]:
    """The checks of a part's file; a truncated last line, of a killed process, is skipped."""
    if not path.exists():
        return ()
    checks = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            checks.append(Check(**json.loads(line)))
        except json.JSONDecodeError:
            break
    return tuple(checks)
