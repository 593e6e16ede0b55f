"""`megaback arrow`: trains a model forward and backward, and compares their losses."""

import json
from collections.abc import Sequence
from pathlib import Path

import click
from rich.box import SIMPLE
from rich.table import Table

from data_pipeline.common.atomic import write_text
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.figures import require_matplotlib, write_picture
from data_pipeline.common.number_ranges import MANY, TWO_OR_MORE
from data_pipeline.common.output_paths import is_our_picture, require_output
from data_pipeline.common.rich_console import SafeConsole
from data_pipeline.common.shared_options import hostfile_option, limit_option, save_before_option
from data_pipeline.common.terminal import echo, print_table
from megaback.config_file import load_config
from megaback.faults.run_ownership import require_run_folder
from megaback.scoring.paired_difference import PairedDifference
from tools.direction_gap.result import JSON_NAME, Arrow, compare, is_summary
from tools.direction_gap.runs import ArrowRun, TrainedPair, require_comparable, runs_of
from tools.model_options import device_option

PICTURE_NAME = "arrow.png"


def sentence(arrow: Arrow) -> str:
    """Summary of the result in one or two sentences."""
    whole = arrow.whole
    text = (
        f"backward costs {_plain(abs(whole.nats), whole.nats_error)} nats/token "
        f"{'more' if whole.nats >= 0 else 'less'} than forward, "
        f"{_plain(abs(whole.percent), whole.percent_error, 2)}%; +- is a standard error over "
        f"{whole.num_documents:,} documents."
    )
    if arrow.seeds_error is None:
        return f"{text} It also varies with the seed: --num-seeds 3 measures that."
    return f"{text} Over {len(arrow.seeds)} seeds it is +- {arrow.seeds_error:.4f}."


def _plain(value: float, error: float | None, digits: int = 4) -> str:
    shown = f"{value:.{digits}f}"
    return shown if error is None else f"{shown} +- {error:.{digits}f}"


def table_of(arrow: Arrow) -> Table:
    """All gaps, one row each."""
    table = Table(
        title=f"Loss in nats/token after {arrow.tokens:,} tokens of training",
        title_justify="left",
        box=SIMPLE,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("targets", no_wrap=True)
    for column in ("forward", "backward", "gap", "+-", "in %", "+-", "tokens"):
        table.add_column(column, justify="right")
    sections: tuple[tuple[str, dict[str, PairedDifference]], ...] = (
        ("", {"all": arrow.whole}),
        ("seed ", {str(seed): gap for seed, gap in arrow.seeds.items()}),
        ("after ", arrow.by_context),
        ("at ", arrow.by_part),
    )
    for prefix, gaps in sections:
        if prefix == "seed " and len(gaps) == 1:
            continue
        table.add_section()
        for name, gap in gaps.items():
            table.add_row(
                prefix + name,
                f"{gap.first:.4f}",
                f"{gap.second:.4f}",
                f"{gap.nats:+.4f}",
                "" if gap.nats_error is None else f"{gap.nats_error:.4f}",
                f"{gap.percent:+.2f}",
                "" if gap.percent_error is None else f"{gap.percent_error:.2f}",
                f"{gap.num_targets:,.0f}",
            )
    return table


def train_all(
    config: Path,
    overrides: tuple[str, ...],
    runs: Sequence[ArrowRun],
    save_before: str | None,
    hostfile: Path | None,
) -> None:
    """Train or resume each run to its end. Exits with the code of a run that fails."""
    from launcher.train import train

    for run in runs:
        click.echo(f"seed {run.seed}, {run.direction.value}: {run.folder}")
        code = train(config, (*overrides, *run.overrides), save_before, hostfile)
        if code:
            raise SystemExit(code)


@click.command(
    cls=ResumableCommand,
    name="arrow",
    epilog=examples(
        "megaback arrow configs/arrow.yaml data.shards=data/prose --num-seeds 3",
        "megaback arrow configs/arrow.yaml --measure-only --limit 500 --device cpu",
    ),
)
@click.argument("config", type=click.Path(path_type=Path))
@click.argument("overrides", nargs=-1)
@click.option(
    "--num-seeds",
    type=MANY.option,
    default=1,
    show_default=True,
    help="Number of pairs of a forward and a backward run; the seeds are training.seed, "
    "training.seed + 1, and so on.",
)
@click.option(
    "--measure-only",
    is_flag=True,
    help="Measure existing runs, without training.",
)
@limit_option("val documents to measure on, spread over the val set", 2000, TWO_OR_MORE)
@device_option
@save_before_option
@hostfile_option
def main(
    config: Path,
    overrides: tuple[str, ...],
    num_seeds: int,
    measure_only: bool,
    limit: int,
    device: str | None,
    save_before: str | None,
    hostfile: Path | None,
) -> None:
    """Train the model of CONFIG, with key.sub=value OVERRIDES, forward and backward, and compare
    the losses.

    Both runs of a pair have the same seed, documents and steps; data.direction is ignored. With RUN
    for the config's `run`, they are written to RUN/seed-N/forward and RUN/seed-N/backward, and the
    results to RUN/arrow.json and RUN/arrow.png. Run the same command again to resume.
    """
    settings = load_config(config, overrides)
    runs = runs_of(settings, num_seeds)
    require_comparable(config, overrides, runs)
    require_matplotlib("megaback arrow")
    for run in runs:
        require_run_folder(load_config(config, (*overrides, *run.overrides)), config)
    # Earlier runs are resumed, so their results are overwritten.
    for name, is_ours in ((JSON_NAME, is_summary), (PICTURE_NAME, is_our_picture)):
        require_output(
            settings.run / name, (config,), is_ours=is_ours, overwrite=True, option="run"
        )
    if not measure_only:
        train_all(config, overrides, runs, save_before, hostfile)
    pairs = [TrainedPair.find(*pair) for pair in zip(runs[::2], runs[1::2], strict=True)]
    arrow = compare(settings, pairs, device, limit)
    from tools.direction_gap.figure import arrow_figure

    write_text(settings.run / JSON_NAME, json.dumps(arrow.to_json(settings), indent=2) + "\n")
    write_picture(arrow_figure(arrow), settings.run / PICTURE_NAME, overwrite=True)
    print_table(SafeConsole(), table_of(arrow))
    echo(sentence(arrow))
    click.echo(f"{settings.run / JSON_NAME}\n{settings.run / PICTURE_NAME}")


if __name__ == "__main__":
    main()
