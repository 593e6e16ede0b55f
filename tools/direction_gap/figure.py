"""Figure of both directions' losses and their gap, by context and by place in the document."""

from typing import TYPE_CHECKING

from data_pipeline.common.figures import GRID_COLOR, TEXT_COLOR, new_figure
from megaback.scoring.paired_difference import PairedDifference
from tools.run_views.curves_figure import COLORS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from tools.direction_gap.result import Arrow

_FORWARD, _BACKWARD, _GAP = COLORS[0], COLORS[1], COLORS[2]


def arrow_figure(arrow: "Arrow") -> "Figure":
    """Both losses above; below, the gap with its standard error, and the overall gap dashed."""
    figure = new_figure(11, 7)
    rows = figure.subplots(2, 2, sharex="col", height_ratios=(3, 2))
    columns = (
        (arrow.by_context, "tokens of context"),
        (arrow.by_part, "place in the document, from its beginning"),
    )
    for number, (gaps, label) in enumerate(columns):
        losses, below = rows[0][number], rows[1][number]
        _draw_losses(losses, gaps)
        _draw_gaps(below, gaps, arrow.whole)
        below.set_xlabel(label)
        below.set_xticks(range(len(gaps)), list(gaps), rotation=45, ha="right", fontsize=8)
        losses.set_title("loss (nats/token)", loc="left", fontsize=10, color=TEXT_COLOR)
        below.set_title("backward less forward", loc="left", fontsize=10, color=TEXT_COLOR)
        for axes in (losses, below):
            axes.grid(color=GRID_COLOR, linewidth=0.7)
            axes.set_axisbelow(True)
            axes.spines[["top", "right"]].set_visible(False)
    handles, labels = rows[0][0].get_legend_handles_labels()
    of_all, label_of_all = rows[1][0].get_legend_handles_labels()
    figure.legend(
        handles + of_all,
        labels + label_of_all,
        loc="outside upper left",
        ncols=4,
        frameon=False,
    )
    return figure


def _draw_losses(axes: "Axes", gaps: dict[str, PairedDifference]) -> None:
    places = range(len(gaps))
    for label, color, values in (
        ("forward", _FORWARD, [gap.first for gap in gaps.values()]),
        ("backward", _BACKWARD, [gap.second for gap in gaps.values()]),
    ):
        axes.plot(places, values, "o-", color=color, linewidth=1.4, markersize=4, label=label)


def _draw_gaps(axes: "Axes", gaps: dict[str, PairedDifference], whole: PairedDifference) -> None:
    errors = [gap.nats_error or 0.0 for gap in gaps.values()]
    axes.errorbar(
        range(len(gaps)),
        [gap.nats for gap in gaps.values()],
        yerr=errors,
        fmt="o",
        color=_GAP,
        markersize=4,
        capsize=3,
        label="gap ± standard error over documents",
    )
    axes.axhline(0, color=TEXT_COLOR, linewidth=0.8)
    axes.axhline(
        whole.nats, color=_GAP, linewidth=1, linestyle="--", label=f"overall gap: {whole.nats:+.4f}"
    )
