"""Figure of a ladder: the gap against the number of parameters, beside the published ones."""

from typing import TYPE_CHECKING

from data_pipeline.common.figures import GRID_COLOR, TEXT_COLOR, new_figure
from tools.direction_gap.ladder_result import Ladder, Point
from tools.direction_gap.published import PUBLISHED
from tools.run_views.curves_figure import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def ladder_figure(ladder: Ladder) -> "Figure":
    """One color per budget: pairs faint, means with standard errors, and the fit dashed."""
    from matplotlib.ticker import EngFormatter

    figure = new_figure(10, 5.5)
    axes = figure.subplots()
    fit = ladder.fit()
    for number, tokens in enumerate(sorted({point.tokens for point in ladder.points})):
        points = sorted(
            (point for point in ladder.points if point.tokens == tokens),
            key=lambda point: point.num_parameters,
        )
        color = COLORS[number % len(COLORS)]
        _draw_budget(axes, points, color, f"{tokens:,} tokens")
        ends = [points[0].num_parameters, points[-1].num_parameters]
        axes.plot(ends, [fit.at(end, tokens) for end in ends], "--", color=color, linewidth=1)
    _draw_published(axes)
    axes.axhline(0, color=TEXT_COLOR, linewidth=0.8)
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(EngFormatter())
    axes.set_xlabel("parameters")
    axes.set_title(
        "backward less forward, % of the forward loss; ± standard error over seeds, fit dashed",
        loc="left",
        fontsize=10,
        color=TEXT_COLOR,
    )
    axes.grid(color=GRID_COLOR, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    return figure


def _draw_budget(axes: "Axes", points: list[Point], color: str, label: str) -> None:
    for point in points:
        percents = [gap.percent for gap in point.seeds.values()]
        axes.plot([point.num_parameters] * len(percents), percents, ".", color=color, alpha=0.4)
    axes.errorbar(
        [point.num_parameters for point in points],
        [point.whole.percent for point in points],
        yerr=[point.percent_seeds_error or 0.0 for point in points],
        fmt="o",
        color=color,
        markersize=5,
        capsize=3,
        label=label,
    )


def _draw_published(axes: "Axes") -> None:
    """Single gaps as squares, ranges as areas."""
    labeled: set[str] = set()
    for known in PUBLISHED:
        (low, high), (low_percent, high_percent) = known.num_parameters, known.percent
        label = None if known.name in labeled else known.name
        labeled.add(known.name)
        if low == high:
            axes.plot(low, low_percent, "s", color=TEXT_COLOR, label=label)
        else:
            axes.fill_between(
                (low, high), low_percent, high_percent, color=TEXT_COLOR, alpha=0.3, label=label
            )
