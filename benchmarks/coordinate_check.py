"""Coordinate check of muP: the change of activations in a few updates, against the width.

    python benchmarks/coordinate_check.py [--widths 64,128,256,512] [--steps 4] [--num-seeds 2]

With `model.base_width` the change must not depend on the width: the exponent of its power law is
within 0.25 of zero for each place in the model, and beyond that without. Otherwise the exit code
is 1. It trains on one batch of random ids.
"""

import statistics

import click
from smoke import Benchmark
from widths.activations import changes, exponent

from data_pipeline.common.number_ranges import COUNT, MANY
from data_pipeline.common.terminal import table_lines
from megaback.config import ModelSection, OptimizerSection

MAX_EXPONENT = 0.25
_HEAD_DIM = 16
_LEARNING_RATE = 3e-3
_OPTIMIZERS = ("adamw", "muon")


def by_place(
    widths: list[int], base_width: int | None, optimizer: str, num_steps: int, num_seeds: int
) -> dict[str, dict[int, float]]:
    """Change by place in the model and by width, as means over seeds."""
    section = OptimizerSection.model_validate({"name": optimizer, "learning_rate": _LEARNING_RATE})
    found: dict[str, dict[int, float]] = {}
    for width in widths:
        fields = {"num_layers": 2, "width": width, "num_heads": width // _HEAD_DIM}
        shape = ModelSection.model_validate({**fields, "base_width": base_width}).resolved()
        measured = [changes(shape, section, num_steps, seed) for seed in range(num_seeds)]
        for place in measured[0]:
            mean = statistics.fmean(one[place] for one in measured)
            found.setdefault(place, {})[width] = mean
    return found


def widths_of(_context: click.Context, _option: click.Parameter, value: str) -> list[int]:
    """The widths of a list, ascending. Raises click.BadParameter."""
    words = value.split(",")
    widths = sorted({int(word) for word in words if word.strip().isdecimal()} - {0})
    is_multiple = all(width % _HEAD_DIM == 0 for width in widths)
    if len(words) < 2 or len(widths) < len(words) or not is_multiple:
        raise click.BadParameter(
            f"{value!r} is not a list of two or more different multiples of {_HEAD_DIM}, such as "
            "64,128,256"
        )
    return widths


@click.command(cls=Benchmark, smoke="--widths 64,128,256 --num-seeds 1")
@click.option(
    "--widths",
    default="64,128,256,512",
    show_default=True,
    callback=widths_of,
    help=f"Widths, in channels: multiples of {_HEAD_DIM}, which is the width of a head.",
)
@click.option("--steps", type=COUNT.option, default=4, show_default=True, help="Number of updates.")
@click.option(
    "--num-seeds", type=MANY.option, default=2, show_default=True, help="Number of seeds."
)
def main(widths: list[int], steps: int, num_seeds: int) -> None:
    """Measure the change of activations with and without model.base_width."""
    rows, is_flat = [], True
    for optimizer in _OPTIMIZERS:
        for base_width in (widths[0], None):
            found = by_place(widths, base_width, optimizer, steps, num_seeds)
            exponents = {place: exponent(values) for place, values in found.items()}
            largest = max(map(abs, exponents.values()))
            is_flat = is_flat and (largest <= MAX_EXPONENT) == (base_width is not None)
            for place, values in found.items():
                cells = [f"{value:.3g}" for value in values.values()]
                base = "none" if base_width is None else str(base_width)
                rows.append([optimizer, base, place, *cells, f"{exponents[place]:+.2f}"])
    heads = ["optimizer", "base_width", "place", *map(str, widths), "exponent"]
    click.echo("\n".join(table_lines(heads, rows, right=range(3, len(heads)))))
    if not is_flat:
        raise SystemExit("the change is not flat with model.base_width, or is flat without it")
    click.echo("flat with model.base_width, and not without")


if __name__ == "__main__":
    main()
