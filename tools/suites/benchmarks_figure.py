"""Figure of benchmarks: accuracy with its interval, of one model or two, and chance."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from data_pipeline.common.figures import GRID_COLOR, TEXT_COLOR, new_figure
from tools.run_views.curves_figure import COLORS
from tools.suites.base import SuiteResult

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_INCHES_PER_SUITE, _OTHER_INCHES = 0.45, 1.4
_APART = 0.24


def benchmarks_figure(models: Sequence[tuple[str, Mapping[str, SuiteResult]]]) -> "Figure":
    """A row per suite, with a dot and its 95% interval for each (label, results).

    Suites without a chance level, whose values are not accuracies, are omitted.
    """
    (_, first), *_ = models
    names = [name for name, result in first.items() if result.paired]
    figure = new_figure(8, _OTHER_INCHES + _INCHES_PER_SUITE * len(names))
    axes = figure.subplots()
    for number, (label, results) in enumerate(models):
        metrics = [results[name].metrics[(results[name].shown or ())[0]] for name in names]
        values = [metric.interval.value for metric in metrics]
        bounds = [
            (
                one.value - (one.value if one.low is None else one.low),
                (one.value if one.high is None else one.high) - one.value,
            )
            for one in (metric.interval for metric in metrics)
        ]
        places = [at + _APART * (number - (len(models) - 1) / 2) for at in range(len(names))]
        axes.errorbar(
            values,
            places,
            xerr=list(zip(*bounds, strict=True)) or None,
            fmt="o",
            color=COLORS[number],
            markersize=5,
            label=label,
        )
        if number == 0:
            axes.plot(
                [metric.chance or 0.0 for metric in metrics],
                range(len(names)),
                "|",
                color=TEXT_COLOR,
                markersize=14,
                label="chance",
            )
    axes.set_yticks(range(len(names)), names)
    axes.invert_yaxis()
    axes.set_xlabel("accuracy, with 95% intervals over rows")
    axes.grid(color=GRID_COLOR, linewidth=0.7, axis="x")
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper left", ncols=3, frameon=False)
    return figure
