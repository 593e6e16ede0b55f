"""`megaback plot`: loss, learning rate, gradient norm and throughput of runs, in one figure.

Writes a PNG, and a self-contained HTML page with the same figure, a table of the runs, the
last values of suites, the differences between their configs, and the newest samples of each.
"""

from collections.abc import Sequence
from html import escape
from pathlib import Path

import click

from data_pipeline.common.command import WorkCommand, examples
from data_pipeline.common.figures import require_matplotlib, require_png, write_picture
from data_pipeline.common.number_ranges import COUNT
from data_pipeline.common.output_paths import (
    MAKER,
    file_with_mark,
    is_our_picture,
    overwrite_option,
    require_output,
    write_output,
)
from data_pipeline.errors import CheckpointMissingError
from megaback.run_folder import METRICS_NAME, SAMPLES_NAME
from megaback.tracking.run_progress import runs_below
from megaback.tracking.samples_log import read_samples
from tools.run_views.branch_tree import TreeRun
from tools.run_views.curves import Axis, RunCurves, differences, names_in_tree, read_curves
from tools.run_views.curves_figure import COLORS, Style, curves_figure, svg_of
from tools.run_views.suites_figure import suites_table

_SMOOTHED_SHARE = 50
_MARK = f'<meta name="generator" content="{MAKER}">'
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #333; max-width: 1200px; margin: 2em auto; }
svg { width: 100%; height: auto; }
table { border-collapse: collapse; margin: 1.5em 0; }
th, td { padding: .3em .9em; text-align: right; border-bottom: 1px solid #ddd; }
th:first-child, td:first-child, .texts th, .texts td { text-align: left; }
i { display: inline-block; width: .8em; height: .8em; border-radius: 50%; margin-right: .5em; }
"""


def draw(
    runs: Sequence[TreeRun],
    out: Path,
    axis: Axis,
    smooth: int | None,
    log: bool,
    overwrite: bool = False,
) -> list[Path]:
    """Write `out.png` and `out.html`.

    Raises the errors of `read_curves`, ConfigError, OutputExistsError, and CheckpointMissingError
    if there is nothing to draw.
    """
    require_png(out)
    picture, page = (
        out.with_name(f"{out.name.removesuffix('.png').removesuffix('.html')}{suffix}")
        for suffix in (".png", ".html")
    )
    for path, is_ours in ((picture, is_our_picture), (page, file_with_mark(_MARK.encode()))):
        require_output(path, is_ours=is_ours, overwrite=overwrite)
    require_matplotlib("megaback plot")
    names = names_in_tree(runs)
    curves = [read_curves(run, axis, name) for run, name in zip(runs, names, strict=True)]
    longest = max(one.num_steps for one in curves)
    if not longest:
        where = ", ".join(str(run.path) for run in runs)
        raise CheckpointMissingError(f"{where}: no step is done yet; try again later")
    look = Style(axis, max(1, longest // _SMOOTHED_SHARE) if smooth is None else smooth, log)
    figure = curves_figure(curves, look)
    write_picture(figure, picture, overwrite=overwrite)
    paths = [run.path for run in runs]
    text = page_of(svg_of(figure), curves, differences(paths), _newest_samples(paths, names))
    write_output(page, text, overwrite=overwrite)
    return [picture, page]


def page_of(
    svg: str,
    curves: Sequence[RunCurves],
    unequal: Sequence[tuple[str, list[str]]],
    samples: Sequence[tuple[str, int, str, str]] = (),
) -> str:
    """A self-contained HTML page. `samples`: run, step, given and whole text of each."""
    title = escape(", ".join(one.name for one in curves))
    rows = [_row(one, COLORS[number % len(COLORS)]) for number, one in enumerate(curves)]
    heads = ("run", "step", "loss", "val loss", "lowest val loss", "tokens/s", "starts")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8">{_MARK}<title>{title}</title>',
        f"<style>{_STYLE}</style></head><body>{svg}",
        _table(heads, rows),
    ]
    suites = [[escape(cell) for cell in row] for row in suites_table(curves)]
    if suites:
        parts.append(_table(("suite", "chance", *(escape(one.name) for one in curves)), suites))
    if unequal:
        names = ("difference", *(escape(one.name) for one in curves))
        cells = [[escape(key), *map(escape, values)] for key, values in unequal]
        parts.append(_table(names, cells))
    if samples:
        texts = [
            [escape(run), f"{step:,}", _with_given(given, text)]
            for run, step, given, text in samples
        ]
        parts.append(_table(("run", "step", "sample"), texts, kind="texts"))
    return "\n".join([*parts, "</body></html>\n"])


def _with_given(given: str, text: str) -> str:
    """A sample as HTML, its given part in bold."""
    if given and text.endswith(given):
        return f"{escape(text.removesuffix(given))}<b>{escape(given)}</b>"
    if given and text.startswith(given):
        return f"<b>{escape(given)}</b>{escape(text.removeprefix(given))}"
    return escape(text)


def _newest_samples(runs: Sequence[Path], names: Sequence[str]) -> list[tuple[str, int, str, str]]:
    """Run, step, given and whole text of the samples at each run's last validation with some."""
    found = []
    for run, name in zip(runs, names, strict=True):
        lines = read_samples(run) if (run / SAMPLES_NAME).is_file() else []
        found += [
            (name, line["step"], line["given"], line["text"])
            for line in lines
            if line["step"] == lines[-1]["step"]
        ]
    return found


def _row(run: RunCurves, color: str) -> list[str]:
    losses, speeds = run.val_loss.values, run.tokens_per_s.since(run.begins).values
    losses_of_steps = run.loss.since(run.begins).values
    last = losses_of_steps[-max(1, len(losses_of_steps) // _SMOOTHED_SHARE) :]
    return [
        f'<i style="background:{color}"></i>{escape(run.name)}',
        f"{run.step:,}",
        f"{last.mean():.4f}" if len(last) else "–",
        f"{losses[-1]:.4f}" if len(losses) else "–",
        f"{losses.min():.4f}" if len(losses) else "–",
        f"{sorted(speeds)[len(speeds) // 2]:,.0f}" if len(speeds) else "–",
        str(len(run.restarts) + 1),
    ]


def _table(heads: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "numbers") -> str:
    head = "".join(f"<th>{cell}</th>" for cell in heads)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>\n" for row in rows)
    return f'<table class="{kind}"><tr>{head}</tr>\n{body}</table>'


def _with_metrics(folder: Path) -> list[TreeRun]:
    """The run of a folder, or those below it, each followed by its branches."""
    roots = [folder] if (folder / METRICS_NAME).is_file() else list(runs_below(folder))
    found = [run for root in roots for run in TreeRun(root).with_branches()]
    return [run for run in found if (run.path / METRICS_NAME).is_file()] or [TreeRun(folder)]


def _once(runs: Sequence[TreeRun]) -> list[TreeRun]:
    """The runs without those that are also given as a branch of another one."""
    branches = {run.path.resolve() for run in runs if run.trunk is not None}
    return [run for run in runs if run.lineage[-1].path.resolve() not in branches]


@click.command(
    cls=WorkCommand,
    name="plot",
    epilog=examples(
        "megaback plot runs/xcoax_100bt",
        "megaback plot runs/forward runs/backward --by tokens --out comparison",
    ),
)
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="RUN...")
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("curves"),
    show_default=True,
    help="Path of the figures, without a suffix: OUT.png and OUT.html are written.",
)
@click.option(
    "--by",
    "axis",
    type=click.Choice(["step", "tokens", "time"]),
    default="step",
    show_default=True,
    help="Quantity on the x axis: steps, tokens, or hours of training steps.",
)
@click.option(
    "--smooth",
    type=COUNT.option,
    help="Window of the moving mean, in steps. Default: 1/50 of the longest run.",
)
@click.option("--log", is_flag=True, help="Use a logarithmic x axis.")
@overwrite_option
def main(
    runs: tuple[Path, ...], out: Path, axis: Axis, smooth: int | None, log: bool, overwrite: bool
) -> None:
    """Plot the curves of one or several runs.

    A RUN may also be a folder with runs up to three levels below it. The branches of a run are
    drawn with it, each from where it left the run.
    """
    found = _once([run for folder in runs for run in _with_metrics(folder)])
    for path in draw(found, out, axis, smooth, log, overwrite):
        click.echo(path)


if __name__ == "__main__":
    main()
