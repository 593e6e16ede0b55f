"""Figure of the loss, learning rate, gradient norm and throughput of runs, as PNG or SVG."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_pipeline.common.figures import GRID_COLOR, TEXT_COLOR, new_figure
from megaback.tracking.loss_by_context import bucket_name, num_buckets
from tools.run_views.curves import Axis, RunCurves
from tools.run_views.suites_figure import CHANCE_STYLE, MAX_COLUMNS, draw_suite, suites_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, which is safe for color blindness.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MAX_RESTARTS = 1000
_COLUMNS = 12
"""Columns of the grid, which rows of one to four panels divide."""
_HEIGHT, _SUITE_HEIGHT = 3.6, 2.7
_LEGEND_COLUMNS = 4
_MARKERS = {"backward": "<", "forward": ">"}
"""Markers of the val loss of each direction of a model of both."""
_STYLES = ("-", "--", ":", "-.")
_LABELS: dict[Axis, str] = {"step": "step", "tokens": "tokens", "time": "hours of training steps"}


@dataclass(frozen=True)
class Style:
    """Options of the figure."""

    axis: Axis
    smooth_steps: int
    is_logarithmic: bool


def curves_figure(runs: Sequence[RunCurves], look: Style) -> "Figure":
    """The panels with all runs, and a legend."""
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, StrMethodFormatter

    has_contexts = any(len(run.context_loss.places) for run in runs)
    suites = suites_of(runs)
    num_rows = -(-len(suites) // MAX_COLUMNS)
    num_columns = -(-len(suites) // num_rows) if num_rows else 1
    heights = [*[_HEIGHT] * (3 if has_contexts else 2), *[_SUITE_HEIGHT] * num_rows]
    figure = new_figure(12, sum(heights))
    grid = figure.add_gridspec(len(heights), _COLUMNS, height_ratios=heights)
    left, right = slice(0, _COLUMNS // 2), slice(_COLUMNS // 2, _COLUMNS)
    loss = figure.add_subplot(grid[0, left])
    rate, norm, speed = (
        figure.add_subplot(grid[place], sharex=loss)
        for place in ((0, right), (1, left), (1, right))
    )
    for axes in (loss, rate):
        axes.tick_params(labelbottom=False)
    if has_contexts:
        _draw_contexts(figure.add_subplot(grid[2, :]), runs)
    steps_axes = [norm, speed]
    for number, name in enumerate(suites):
        row, column = divmod(number, num_columns)
        width = _COLUMNS // num_columns
        place = grid[len(heights) - num_rows + row, column * width : (column + 1) * width]
        axes = figure.add_subplot(place, sharex=loss)
        _style_axes(axes, draw_suite(axes, name, runs, _color_and_style))
        steps_axes.append(axes)
    for number, run in enumerate(runs):
        color, style = _color_and_style(number)
        _draw_loss(loss, run, look, color, style)
        for axes, curve, width in (
            (rate, run.learning_rate, 1),
            (norm, run.gradient_norm, look.smooth_steps),
            (speed, run.tokens_per_s, look.smooth_steps),
        ):
            drawn = curve.smoothed(width).since(run.begins).thinned()
            marker = "o" if len(drawn.places) == 1 else None
            axes.plot(drawn.places, drawn.values, style, color=color, linewidth=1.4, marker=marker)
        for axes in (loss, rate, norm, speed):
            # One artist for all: one per line takes milliseconds each.
            axes.vlines(
                run.restarts[:_MAX_RESTARTS],
                0,
                1,
                transform=axes.get_xaxis_transform(),
                color=color,
                linewidth=0.7,
                linestyle=(0, (1, 3)),
            )
    norm.set_yscale("log")
    norm.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    norm.yaxis.set_minor_formatter(StrMethodFormatter("{x:g}"))
    low, high = norm.get_ylim()
    if high > 8 * low:  # labels of all minor ticks would overlap
        norm.yaxis.set_minor_locator(LogLocator(subs=(2, 5)))
    if look.is_logarithmic:
        loss.set_xscale("log")
    elif max(run.num_steps for run in runs) == 1:
        loss.set_xlim(left=0)  # else the axis zooms in on the single point
    for axes, title in (
        (loss, "loss (nats/token)"),
        (rate, "learning rate"),
        (norm, "gradient norm, before clipping"),
        (speed, "tokens/s"),
    ):
        _style_axes(axes, title)
    speed.set_ylim(bottom=0)
    speed.yaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in steps_axes:
        axes.set_xlabel(_LABELS[look.axis])
        if not look.is_logarithmic and look.axis != "time":
            axes.xaxis.set_major_formatter(EngFormatter(sep=""))
            axes.xaxis.set_major_locator(MaxNLocator(7, integer=True))
    _draw_legend(figure, loss, runs)
    return figure


def _style_axes(axes: "Axes", title: str) -> None:
    axes.set_title(title, loc="left", fontsize=10, color=TEXT_COLOR)
    axes.grid(color=GRID_COLOR, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _color_and_style(number: int) -> tuple[str, str]:
    return COLORS[number % len(COLORS)], _STYLES[number // len(COLORS) % len(_STYLES)]


def _draw_contexts(axes: "Axes", runs: Sequence[RunCurves]) -> None:
    """Loss by tokens of context."""
    maximum = 1.0
    for number, run in enumerate(runs):
        color, style = _color_and_style(number)
        curve = run.context_loss
        axes.plot(curve.places, curve.values, "o" + style, color=color, markersize=4)
        maximum = max(maximum, *curve.places, 1.0)
    axes.set_xscale("log", base=2)
    buckets = range(num_buckets(int(maximum)))
    axes.set_xticks([1 << bucket for bucket in buckets], list(map(bucket_name, buckets)))
    _style_axes(axes, "last val loss (nats/token) by tokens of context")


def _draw_loss(axes: "Axes", run: RunCurves, look: Style, color: str, style: str) -> None:
    """Each step faintly, their mean over a window as a line, validations as rings."""
    if look.smooth_steps > 1:
        faint = run.loss.since(run.begins).thinned()
        axes.plot(faint.places, faint.values, color=color, linewidth=0.5, alpha=0.25)
    mean = run.loss.smoothed(look.smooth_steps).since(run.begins).thinned()
    marker = "o" if len(mean.places) == 1 else None
    axes.plot(
        mean.places, mean.values, style, color=color, linewidth=1.6, marker=marker, label=run.name
    )
    axes.plot(
        run.val_loss.places,
        run.val_loss.values,
        "o",
        color=color,
        markerfacecolor="white",
        markersize=4.5,
    )
    for name, curve in run.val_loss_by_direction.items():
        axes.plot(curve.places, curve.values, _MARKERS[name], color=color, markersize=4)
    if len(run.skipped) and len(run.loss.places):
        import numpy as np

        heights = np.interp(run.skipped, run.loss.places, run.loss.values)
        axes.plot(run.skipped, heights, "x", color=color, markersize=6)


def _draw_legend(figure: "Figure", axes: "Axes", runs: Sequence[RunCurves]) -> None:
    """Legend of the runs, and of the markers in use."""
    from matplotlib.lines import Line2D

    handles, labels = axes.get_legend_handles_labels()
    if any(len(run.val_loss.places) for run in runs):
        ring = {"marker": "o", "markerfacecolor": "white", "markersize": 4.5, "linestyle": ""}
        handles.append(Line2D([], [], color=TEXT_COLOR, **ring))  # type: ignore[arg-type]
        labels.append("val loss")
    for name, marker in _MARKERS.items():
        if any(name in run.val_loss_by_direction for run in runs):
            handles.append(Line2D([], [], color=TEXT_COLOR, marker=marker, linestyle=""))
            labels.append(f"val loss, {name}")
    if any(len(run.restarts) for run in runs):
        handles.append(Line2D([], [], color=TEXT_COLOR, linewidth=0.7, linestyle=(0, (1, 3))))
        labels.append("resume")
    if any(len(run.skipped) for run in runs):
        handles.append(Line2D([], [], color=TEXT_COLOR, marker="x", linestyle=""))
        labels.append("skipped step")
    if any(suite.chance is not None for run in runs for suite in run.suites.values()):
        handles.append(Line2D([], [], **CHANCE_STYLE))  # type: ignore[arg-type]
        labels.append("chance")
    columns = min(len(labels), _LEGEND_COLUMNS)
    by_row = [number for first in range(columns) for number in range(first, len(labels), columns)]
    figure.legend(
        [handles[number] for number in by_row],
        [labels[number] for number in by_row],
        loc="outside upper left",
        ncols=columns,  # matplotlib fills columns first
        frameon=False,
    )


def svg_of(figure: "Figure") -> str:
    """The figure as an SVG element; deterministic."""
    import matplotlib as mpl

    written = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": "megaback", "svg.fonttype": "none"}):
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    text = written.getvalue()
    return text[text.index("<svg") :]
