"""Table and summary of a sweep."""

from collections import Counter

from rich.box import SIMPLE
from rich.table import Table

from tools.sweeps.result import Setting, SweepResult
from tools.sweeps.runs import short_names, value_text


def sweep_table(result: SweepResult) -> Table:
    """One row per setting, the best first."""
    table = Table(
        title=f"{result.kind} loss in nats/token; +- is a standard error over seeds",
        title_justify="left",
        box=SIMPLE,
        show_edge=False,
        pad_edge=False,
    )
    for name in short_names(result.keys).values():
        table.add_column(name, no_wrap=True)
    for column in ("loss", "+-", "seeds", "above best", "+-"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("")
    for setting in result.settings:
        table.add_row(*map(value_text, setting.values.values()), *_cells(result, setting))
    return table


def _cells(result: SweepResult, setting: Setting) -> tuple[str, ...]:
    best = result.best
    is_best = setting is best
    above = None if best is None or is_best else setting.above(best)
    notes = ["best"] if is_best else []
    if setting.num_diverged:
        notes.append(f"diverged: {setting.num_diverged} of {setting.num_runs}")
    if setting.num_unfinished:
        notes.append(f"not finished: {setting.num_unfinished} of {setting.num_runs}")
    return (
        "" if setting.loss is None else f"{setting.loss:.4f}",
        _shown(setting.error if setting.loss is not None else None),
        str(len(setting.losses)),
        "" if above is None else f"{above[0]:+.4f}",
        _shown(None if above is None else above[1]),
        ", ".join(notes),
    )


def _shown(error: float | None) -> str:
    return "" if error is None else f"{error:.4f}"


def summary(result: SweepResult) -> str:
    """The best setting and the state of the runs, in one or two sentences."""
    best = result.best
    states = Counter(run.state for run in result.runs)
    counts = ", ".join(f"{count} {state}" for state, count in states.items())
    text = f"{len(result.runs)} runs: {counts}."
    if best is None:
        return text
    names = short_names(result.keys)
    values = ", ".join(f"{names[key]} {value_text(one)}" for key, one in best.values.items())
    plus = "" if best.error is None else f" +- {best.error:.4f}"
    text += f" The best has {values or 'one setting'}: {best.loss:.4f}{plus} nats/token."
    if best.error is None:
        text += " How much it varies with the seed is unknown: training.seed=0,1,2 measures that."
    return text
