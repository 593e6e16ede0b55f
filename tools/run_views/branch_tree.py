"""A run and its branches as a tree: where each left its trunk, and lines of text that show it."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from megaback.branches import branches_of
from megaback.faults.exit_record import read_history
from megaback.tracking.metrics import read_metrics

_Node = TypeVar("_Node")


@dataclass(frozen=True, kw_only=True)
class Departure:
    """Point at which a branch left its trunk, by the record of its first start."""

    checkpoint: str
    step: int
    """Step of the trunk's checkpoint."""
    keeps_schedule: bool
    """Whether the branch counts its steps from the trunk's; otherwise from 0."""


def departure_of(history: Sequence[Mapping[str, Any]]) -> Departure | None:
    """The departure in the lines of a run's history; None for a run that is no branch.

    Raises KeyError, TypeError or ValueError for lines of another version.
    """
    for line in history:
        if line.get("event") == "start" and line.get("branch") is not None:
            branch = line["branch"]
            return Departure(
                checkpoint=str(branch["path"]),
                step=int(branch["step"]),
                keeps_schedule="schedule" in branch["kept"],
            )
    return None


@dataclass(frozen=True)
class TreeRun:
    """A run, and the run that it is a branch of, if it is below that."""

    path: Path
    trunk: "TreeRun | None" = None

    @property
    def lineage(self) -> "list[TreeRun]":
        """The run, its trunk, the trunk of that, and so on."""
        return [self] if self.trunk is None else [self, *self.trunk.lineage]

    def branches(self) -> "list[TreeRun]":
        """The branches in the run's folder, without links that lead back."""
        passed = {run.path.resolve() for run in self.lineage}
        below = [path for path in branches_of(self.path) if path.resolve() not in passed]
        return [TreeRun(branch, self) for branch in below]

    def with_branches(self) -> "Iterator[TreeRun]":
        """The run, then its branches, each followed by its own."""
        yield self
        for branch in self.branches():
            yield from branch.with_branches()


@dataclass(frozen=True, kw_only=True)
class RunLines:
    """Lines of a run's metrics, with steps and tokens counted from the start of the first trunk."""

    before: list[dict[str, Any]]
    """Lines of the trunks up to the branch point; empty without a trunk below which it is."""
    own: list[dict[str, Any]]
    step: int = 0
    """Step of the branch point."""
    offset: int = 0
    """Difference from the run's own count of steps."""


def lines_of(run: TreeRun) -> RunLines:
    """Metrics of a run after those of its trunks.

    Raises KeyError, TypeError or ValueError for lines of another version, and the errors of
    `read_metrics`.
    """
    own, left = read_metrics(run.path), departure_of(read_history(run.path))
    if run.trunk is None or left is None:
        return RunLines(before=[], own=own)
    trunk = lines_of(run.trunk)
    at = left.step + trunk.offset
    before = [line for line in (*trunk.before, *trunk.own) if line["step"] <= at]
    offset = trunk.offset if left.keeps_schedule else at
    tokens = 0
    if not left.keeps_schedule:
        tokens = max((line["tokens_seen"] for line in before if "tokens_seen" in line), default=0)
    moved = []
    for line in own:
        step = line["step"] + offset
        # Steps up to the branch point are copies of the trunk's.
        if step > at or (step == at and "learning_rate" not in line):
            seen = {"tokens_seen": line["tokens_seen"] + tokens} if "tokens_seen" in line else {}
            moved.append({**line, "step": step, **seen})
    return RunLines(before=before, own=moved, step=at, offset=offset)


def tree_lines(
    root: _Node, children: Callable[[_Node], Sequence[_Node]], text: Callable[[_Node], str]
) -> list[str]:
    """One line per node, with the lines of a tree before its text."""
    lines = [text(root)]
    below = children(root)
    for number, child in enumerate(below, start=1):
        is_last = number == len(below)
        first, *others = tree_lines(child, children, text)
        lines.append(f"{'└─' if is_last else '├─'} {first}")
        lines += [f"{'  ' if is_last else '│ '} {line}" for line in others]
    return lines
