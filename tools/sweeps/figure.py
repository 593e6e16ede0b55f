"""Figure of a sweep: loss against one key of the config, with a line per combination of others."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_pipeline.common.figures import GRID_COLOR, TEXT_COLOR, new_figure
from data_pipeline.errors import ConfigError
from tools.run_views.curves_figure import COLORS
from tools.sweeps.result import Setting, SweepResult
from tools.sweeps.runs import short_names, value_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_FIRST_CHOICE = "optimizer.learning_rate"
_STYLES = ("-", "--", ":", "-.")


def horizontal_key(result: SweepResult, wanted: str | None) -> str | None:
    """Key of the horizontal axis: the learning rate or else the first key of numbers.

    None if every key is the seed's. Raises ConfigError if `wanted` is no key of the sweep.
    """
    if wanted is not None and wanted not in result.keys:
        raise ConfigError(
            f"--x-axis {wanted}: the sweep is over {', '.join(result.keys)}; give one"
        )
    numeric = [key for key in result.keys if _is_numeric(result, key)]
    first = [key for key in numeric if key == _FIRST_CHOICE]
    return next(iter([*([wanted] if wanted else []), *first, *numeric, *result.keys]), None)


def _is_numeric(result: SweepResult, key: str) -> bool:
    values = [setting.values[key] for setting in result.settings]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in values)


def sweep_figure(result: SweepResult, x_axis: str | None = None) -> "Figure":
    """Means with standard errors, seeds faint, and the best setting of each line ringed.

    Settings with a diverged run are crosses at the upper edge. `x_axis`: key of the horizontal
    axis.
    """
    figure = new_figure(9, 5.5)
    axes = figure.subplots()
    key = horizontal_key(result, x_axis) or ""
    values = _sorted_values([setting.values.get(key) for setting in result.settings])
    is_scale = key != "" and _is_numeric(result, key) and len(values) > 1
    places = {value_text(value): float(value) if is_scale else n for n, value in enumerate(values)}
    lines: dict[str, list[Setting]] = {}
    names = short_names(result.keys)
    others = _line_keys(result, key)
    for setting in sorted(result.settings, key=lambda one: _order(one.values)):
        label = ", ".join(f"{names[one]} {value_text(setting.values[one])}" for one in others)
        lines.setdefault(label, []).append(setting)
    for number, (label, settings) in enumerate(lines.items()):
        spots = [places[value_text(one.values.get(key))] for one in settings]
        _draw_line(axes, spots, settings, number, label)
    if is_scale and min(places.values()) > 0:
        axes.set_xscale("log")
    axes.set_xticks([*places.values()], [*places] if key else [""])
    axes.set_xticks([], minor=True)
    axes.set_xlabel(key)
    axes.set_title(
        f"{result.kind} loss (nats/token); ± standard error over seeds, ring: lowest of a line, "
        "cross: diverged",
        loc="left",
        fontsize=10,
        color=TEXT_COLOR,
    )
    axes.grid(color=GRID_COLOR, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    if lines.keys() - {""}:
        axes.legend(frameon=False)
    return figure


def _line_keys(result: SweepResult, key: str) -> list[str]:
    """Keys that distinguish lines, without those that another one determines, as zipped ones do."""
    kept = [key] if key else []

    def num_values(*keys: str) -> int:
        return len({repr([one.values[part] for part in keys]) for one in result.settings})

    for other in result.keys:
        if not any(num_values(one, other) == num_values(one) for one in kept):
            kept.append(other)
    return [one for one in kept if one != key]


def _sorted_values(values: Sequence[Any]) -> list[Any]:
    distinct = {value_text(value): value for value in values}
    return sorted(distinct.values(), key=lambda value: _order({"": value}))


def _order(values: Mapping[str, Any]) -> list[tuple[float, str]]:
    """Sort key: numbers by size, before all other values."""
    return [
        (float(one), "") if isinstance(one, int | float) else (math.inf, value_text(one))
        for one in values.values()
    ]


def _draw_line(
    axes: "Axes", spots: Sequence[float], settings: Sequence[Setting], number: int, label: str
) -> None:
    color, style = COLORS[number % len(COLORS)], _STYLES[number // len(COLORS) % len(_STYLES)]
    measured = [
        (spot, setting, setting.loss)
        for spot, setting in zip(spots, settings, strict=True)
        if setting.loss is not None
    ]
    for spot, setting, _ in measured:
        losses = [*setting.losses.values()]
        axes.plot([spot] * len(losses), losses, ".", color=color, alpha=0.35, markersize=5)
    axes.errorbar(
        [spot for spot, _, _ in measured],
        [loss for _, _, loss in measured],
        yerr=[setting.error or 0.0 for _, setting, _ in measured],
        fmt="o",
        linestyle=style,
        color=color,
        markersize=5,
        linewidth=1.4,
        capsize=3,
        label=label or None,
    )
    if len(measured) > 1:
        spot, _, loss = min(measured, key=lambda one: one[2])
        axes.plot(spot, loss, "o", color=color, markersize=12, fillstyle="none")
    diverged = [spot for spot, one in zip(spots, settings, strict=True) if one.num_diverged]
    edge = axes.get_xaxis_transform()  # heights as a share of the axes
    axes.plot(diverged, [0.98] * len(diverged), "x", color=color, markersize=8, transform=edge)
