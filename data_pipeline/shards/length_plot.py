"""Plot of document lengths, drawn by matplotlib, which is an extra."""

from pathlib import Path

from data_pipeline.common.figures import (
    GRID_COLOR,
    TEXT_COLOR,
    new_figure,
    require_matplotlib,
    write_picture,
)
from data_pipeline.shards.document_lengths import DocumentLengths

_DOCUMENTS_COLOR = "#8db3d6"
_TOKENS_COLOR = "#c8541f"
NEEDED_BY = ("`picture`", ", or omit `picture`")
"""Name of the option that needs matplotlib, and the alternative to installing it."""


def draw_histogram(
    lengths: DocumentLengths, title: str, path: Path, *, overwrite: bool = False
) -> None:
    """Write a PNG of the shares of documents and tokens by length, atomically.

    Raises BackendError without matplotlib, OutputExistsError, and OSError.
    """
    require_matplotlib(*NEEDED_BY)
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator, PercentFormatter

    bins = lengths.bins()
    edges = [piece.low for piece in bins] + [bins[-1].high + 1]
    widths = [piece.high + 1 - piece.low for piece in bins]
    document_share = [100 * piece.documents / lengths.num_documents for piece in bins]
    token_share = [100 * piece.tokens / lengths.tokens for piece in bins]

    figure = new_figure(9, 5)
    axes = figure.add_subplot()
    bars = axes.bar(
        edges[:-1],
        document_share,
        width=widths,
        align="edge",
        color=_DOCUMENTS_COLOR,
        edgecolor="white",
        label="share of documents",
    )
    outline = axes.stairs(
        token_share, edges, color=_TOKENS_COLOR, linewidth=2, label="share of tokens", baseline=0
    )
    marks = [
        axes.axvline(
            value,
            color=TEXT_COLOR,
            linestyle=style,
            linewidth=1.2,
            label=f"{name}: {value:,.0f} tokens",
        )
        for name, value, style in (
            ("median", float(lengths.quantile(0.5)), "--"),
            ("mean", lengths.mean, ":"),
        )
    ]
    highest = max([*document_share, *token_share])
    axes.set_xscale("log", base=2)
    axes.set_xlim(edges[0], edges[-1])
    axes.set_ylim(0, 1.12 * highest)
    every = -(-len(edges) // 16)
    axes.xaxis.set_major_locator(FixedLocator(edges[::every]))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda length, _: f"{length:,.0f}"))
    axes.yaxis.set_major_formatter(PercentFormatter(decimals=0))
    axes.set_xlabel("length of a document (tokens, markers included; a bar for each doubling)")
    axes.set_ylabel("share of the split (%)")
    axes.set_title(title, loc="left", fontsize=12, color=TEXT_COLOR)
    axes.grid(axis="y", color=GRID_COLOR, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(handles=[bars, outline, *marks], frameon=False)

    write_picture(figure, path, overwrite=overwrite)
