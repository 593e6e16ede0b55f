"""Table and summary of a ladder."""

from rich.box import SIMPLE
from rich.table import Table

from tools.direction_gap.ladder_fit import Estimate
from tools.direction_gap.ladder_result import Ladder
from tools.direction_gap.published import PUBLISHED


def ladder_table(ladder: Ladder) -> Table:
    """One row per rung, and the published gaps."""
    table = Table(
        title="Backward less forward; errors in points, over seeds and over documents",
        title_justify="left",
        box=SIMPLE,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("size", no_wrap=True)
    columns = (
        "parameters",
        "tokens",
        "seeds",
        "forward",
        "nats/token",
        "in %",
        "+- seeds",
        "+- docs",
    )
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    for point in ladder.points:
        whole = point.whole
        table.add_row(
            point.size,
            f"{point.num_parameters:,}",
            f"{point.tokens:,}",
            str(len(point.seeds)),
            f"{whole.first:.4f}",
            f"{whole.nats:+.4f}",
            f"{whole.percent:+.2f}",
            *(
                "" if error is None else f"{error:.2f}"
                for error in (point.percent_seeds_error, whole.percent_error)
            ),
        )
    table.add_section()
    for known in PUBLISHED:
        parameters = _range(known.num_parameters, 1e-6, ",.0f") + "M"
        table.add_row(known.name, parameters, *[""] * 4, f"+{_range(known.percent, 1, '.2f')}")
    return table


def fit_sentence(ladder: Ladder) -> str:
    """The fit in one or two sentences."""
    fit = ladder.fit()
    terms = [
        f"{_plain(slope)} points per tenfold {quantity}"
        for quantity, slope in (("parameters", fit.per_parameters), ("tokens", fit.per_tokens))
        if slope is not None
    ]
    change = f"; it changes by {' and '.join(terms)}" if terms else ""
    text = (
        f"fit over {fit.num_pairs} pairs: {_plain(fit.center)}% at {fit.mean_parameters:,.0f} "
        f"parameters and {fit.mean_tokens:,.0f} tokens{change}."
    )
    if fit.scatter is None:
        return f"{text} More seeds give it errors: --num-seeds 3."
    return (
        f"{text} A pair scatters by {fit.scatter:.2f} points about it. It describes these sizes "
        "and budgets, no others."
    )


def missing_sentence(ladder: Ladder) -> str:
    """Rungs without finished runs, in one sentence; empty if there are none."""
    if not ladder.missing:
        return ""
    return f"not finished yet: {', '.join(ladder.missing)}; run the same command again to resume."


def _plain(estimate: Estimate) -> str:
    shown = f"{estimate.value:+.2f}"
    return shown if estimate.error is None else f"{shown} +- {estimate.error:.2f}"


def _range(ends: tuple[float, float], factor: float, shown: str) -> str:
    low, high = (format(end * factor, shown) for end in ends)
    return low if low == high else f"{low} to {high}"
