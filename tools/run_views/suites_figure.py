"""Panels of the suites that runs measured: one per suite, with intervals and chance."""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from data_pipeline.common.figures import TEXT_COLOR
from tools.run_views.curves import RunCurves, SuiteCurve

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MAX_COLUMNS = 4
CHANCE_STYLE = {"color": TEXT_COLOR, "linewidth": 0.9, "linestyle": (0, (4, 3))}


def suites_of(runs: Sequence[RunCurves]) -> list[str]:
    """Names of all suites, in the order of the runs."""
    return list(dict.fromkeys(name for run in runs for name in run.suites))


def draw_suite(
    axes: "Axes",
    name: str,
    runs: Sequence[RunCurves],
    color_and_style: Callable[[int], tuple[str, str]],
) -> str:
    """A line per run with its 95% interval as a band, and chance dashed; returns a title."""
    last: SuiteCurve | None = None
    for number, run in enumerate(runs):
        curve = run.suites.get(name)
        if curve is None:
            continue
        color, style = color_and_style(number)
        axes.plot(curve.places, curve.values, "o" + style, color=color, markersize=3, linewidth=1.4)
        axes.fill_between(curve.places, curve.low, curve.high, color=color, alpha=0.13, linewidth=0)
        if curve.chance is not None:
            axes.axhline(curve.chance, **CHANCE_STYLE)  # type: ignore[arg-type]
        last = curve
    assert last is not None
    quantity = "bits/byte" if last.chance is None else "accuracy"
    return f"{name}: {quantity}, {last.rows:,} rows"


def suites_table(runs: Sequence[RunCurves]) -> list[list[str]]:
    """Per suite its name, chance, and the last value of each run with its interval."""
    table = []
    for name in suites_of(runs):
        curves = [run.suites.get(name) for run in runs]
        chances = [one.chance for one in curves if one is not None and one.chance is not None]
        chance = f"{chances[0]:.3f}" if chances else "–"
        table.append([name, chance, *map(_last, curves)])
    return table


def _last(curve: SuiteCurve | None) -> str:
    if curve is None:
        return "–"
    between = f"({curve.low[-1]:.3f} to {curve.high[-1]:.3f})"
    return f"{curve.metric} {curve.values[-1]:.3f} {between}"
