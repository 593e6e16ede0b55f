"""Options that several commands share, of what a model is run with."""

import click

from data_pipeline.common.number_ranges import SEED, TEMPERATURE, TOP_K

temperature_option = click.option(
    "--temperature",
    "--temp",
    "temp",
    type=TEMPERATURE.option,
    default=0.8,
    show_default=True,
    help="Sampling temperature; 0 takes the most likely token.",
)
top_k_option = click.option(
    "--top-k",
    type=TOP_K.option,
    default=200,
    show_default=True,
    help="Number of most likely tokens to sample from; 0: all.",
)
seed_option = click.option(
    "--seed",
    type=SEED.option,
    default=0,
    show_default=True,
    help="Seed of the random number generator.",
)
device_option = click.option(
    "--device", default=None, help="Device: cpu, cuda, cuda:1, ... Default: cuda if there is one."
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["float32", "bfloat16"]),
    default="float32",
    show_default=True,
    help="Data type of the weights.",
)
