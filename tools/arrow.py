"""`megaback arrow`: trains a model forward and backward, and compares their losses."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from rich.box import SIMPLE
from rich.table import Table

from data_pipeline.common.atomic import write_text
from data_pipeline.common.command import ResumableCommand, examples
from data_pipeline.common.figures import require_matplotlib, write_picture
from data_pipeline.common.number_ranges import MANY, TWO_OR_MORE
from data_pipeline.common.output_paths import Recognizes, is_our_picture, require_output
from data_pipeline.common.rich_console import SafeConsole
from data_pipeline.common.shared_options import hostfile_option, limit_option, save_before_option
from data_pipeline.common.terminal import echo, print_table
from data_pipeline.errors import CheckpointMissingError, ConfigError
from megaback.config import Config
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.faults.run_ownership import require_run_folder
from megaback.faults.stop_request import local_time_of
from megaback.run_folder import newest_checkpoint_step
from megaback.scoring.paired_difference import PairedDifference
from tools.direction_gap.ladder import Rung, parse_budgets, parse_sizes, rungs_of
from tools.direction_gap.ladder_result import LADDER_NAME, Ladder, Point, is_ladder
from tools.direction_gap.ladder_table import fit_sentence, ladder_table, missing_sentence
from tools.direction_gap.ladder_training import Trains, earlier_points, measured_points
from tools.direction_gap.result import JSON_NAME, Arrow, compare, is_summary, measured_seeds
from tools.direction_gap.runs import (
    ArrowRun,
    TrainedPair,
    require_comparable,
    runs_of,
    runs_of_seeds,
    train_all,
)
from tools.model_options import device_option

PICTURE_NAME, LADDER_PICTURE_NAME = "arrow.png", "ladder.png"
ARROW_FILES = {JSON_NAME: is_summary, PICTURE_NAME: is_our_picture}
LADDER_FILES = {LADDER_NAME: is_ladder, LADDER_PICTURE_NAME: is_our_picture}


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


def write_arrow(config: Config, arrow: Arrow) -> None:
    """Write the result and its figure into the folder of the config's `run`."""
    from tools.direction_gap.figure import arrow_figure

    write_text(config.run / JSON_NAME, json.dumps(arrow.to_json(config), indent=2) + "\n")
    write_picture(arrow_figure(arrow), config.run / PICTURE_NAME, overwrite=True)


def write_ladder(config: Config, ladder: Ladder) -> None:
    """The same for a ladder."""
    from tools.direction_gap.ladder_figure import ladder_figure

    write_text(config.run / LADDER_NAME, json.dumps(ladder.to_json(config), indent=2) + "\n")
    write_picture(ladder_figure(ladder), config.run / LADDER_PICTURE_NAME, overwrite=True)


def report_ladder(config: Config, ladder: Ladder) -> None:
    """Write a ladder, and print it and the paths of its result."""
    write_ladder(config, ladder)
    print_table(SafeConsole(), ladder_table(ladder))
    echo(fit_sentence(ladder))
    if ladder.missing:
        echo(missing_sentence(ladder))
    click.echo(f"{config.run / LADDER_NAME}\n{config.run / LADDER_PICTURE_NAME}")


@click.command(
    cls=ResumableCommand,
    name="arrow",
    epilog=examples(
        "megaback arrow configs/arrow.yaml data.shards=data/prose --num-seeds 3",
        "megaback arrow configs/arrow.yaml --measure-only --limit 500 --device cpu",
        "megaback arrow configs/arrow.yaml model.tie_embeddings=false model.base_width=256 "
        "--sizes 64x2,128x4 --budgets 300k,600k",
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
    "--sizes",
    metavar="WIDTHxLAYERS,...",
    help="Sizes of models to compare, such as 64x2,128x4; the heads have the config's size.",
)
@click.option(
    "--budgets",
    metavar="TOKENS,...",
    help="Numbers of training tokens to compare, such as 300k,1.5M; each is a run of its own.",
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
    sizes: str | None,
    budgets: str | None,
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

    With --sizes and --budgets, this is done for each size and number of training tokens, in
    RUN/WIDTHxLAYERS-TOKENS; a table, a fit, RUN/ladder.json and RUN/ladder.png compare them.
    """
    if (sizes is None) != (budgets is None):
        raise ConfigError("`sizes` and `budgets` belong together; give both, or neither")
    settings = load_config(config, overrides)
    save_before = local_time_of(save_before)

    def train(own: tuple[str, ...], runs: Sequence[ArrowRun]) -> None:
        train_all(config, (*overrides, *own), runs, save_before, hostfile)

    if sizes is not None and budgets is not None:
        earlier = earlier_points(settings)
        rungs = rungs_of(
            config,
            overrides,
            parse_sizes(sizes),
            parse_budgets(budgets),
            num_seeds,
            {point.place: [*point.seeds] for point in earlier.values()},
        )
        for rung in rungs:
            _require(config, (*overrides, *rung.overrides), rung.config.run, rung.runs, ARROW_FILES)
        _require(config, overrides, settings.run, [], LADDER_FILES)
        if settings.model.base_width is None and len({rung.size.width for rung in rungs}) > 1:
            click.echo(
                "every width has the same learning rate; model.base_width transfers it by muP"
            )
        _climb(settings, rungs, None if measure_only else train, earlier, device, limit)
        return
    runs = runs_of(settings, num_seeds)
    _require(config, overrides, settings.run, runs, ARROW_FILES)
    fingerprint = open_data(settings.undivided(), 0, 1).fingerprint
    pairs = earlier_pairs(settings, runs)
    for pair in pairs:
        pair.require_config(settings, fingerprint)
    if not measure_only:
        train((), runs)
    for forward, backward in zip(runs[::2], runs[1::2], strict=True):
        pairs.append(TrainedPair.find(forward, backward))
        pairs[-1].require_config(settings, fingerprint)
    pairs.sort(key=lambda pair: pair.seed)
    arrow = compare(settings, pairs, device, limit)
    write_arrow(settings, arrow)
    print_table(SafeConsole(), table_of(arrow))
    echo(sentence(arrow))
    click.echo(f"{settings.run / JSON_NAME}\n{settings.run / PICTURE_NAME}")


def earlier_pairs(config: Config, runs: Sequence[ArrowRun]) -> list[TrainedPair]:
    """The pairs in an earlier result whose seeds are not those of `runs`.

    Raises CheckpointMissingError if one is gone, CheckpointCorruptError, and the errors of
    `TrainedPair.find`.
    """
    seeds = set(measured_seeds(config.run)) - {run.seed for run in runs}
    others = runs_of_seeds(config, seeds)
    for run in others:
        if newest_checkpoint_step(run.folder) == 0:
            raise CheckpointMissingError(
                f"{config.run / JSON_NAME} has seed {run.seed}, whose run {run.folder} is gone; "
                f"restore it, or move {JSON_NAME} away to measure the other seeds without it"
            )
    return [TrainedPair.find(*pair) for pair in zip(others[::2], others[1::2], strict=True)]


def _require(
    config: Path,
    overrides: tuple[str, ...],
    folder: Path,
    runs: list[ArrowRun],
    files: Mapping[str, Recognizes],
) -> None:
    """Check, before any training, the runs, their folders, and the files of the result."""
    require_comparable(config, overrides, runs)
    require_matplotlib("megaback arrow")
    for run in runs:
        require_run_folder(load_config(config, (*overrides, *run.overrides)), config)
    # Earlier runs are resumed, so their results are overwritten.
    for name, is_ours in files.items():
        require_output(folder / name, (config,), is_ours=is_ours, overwrite=True, option="run")


def _climb(
    settings: Config,
    rungs: Sequence[Rung],
    train: Trains | None,
    earlier: Mapping[str, Point],
    device: str | None,
    limit: int,
) -> None:
    """Measure all rungs; the result is written after each, and shown if training stops.

    It keeps the earlier points until they are measured again.
    """
    found = dict(earlier)

    def ladder() -> Ladder:
        missing = [
            rung.name
            for rung in rungs
            if any(
                rung.name not in found or run.seed not in found[rung.name].seeds
                for run in rung.runs
            )
        ]
        return Ladder([found[rung.name] for rung in rungs if rung.name in found], missing)

    try:
        for point in measured_points(rungs, train, earlier, device, limit, write_arrow):
            if found.get(point.name) != point:
                found[point.name] = point
                write_ladder(settings, ladder())
    except SystemExit:
        if found:
            report_ladder(settings, ladder())
        raise
    if not found:
        raise CheckpointMissingError(
            f"no pair of runs below {settings.run} is finished; train them, without `measure_only`"
        )
    report_ladder(settings, ladder())


if __name__ == "__main__":
    main()
