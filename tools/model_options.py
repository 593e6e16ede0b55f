"""Shared options of commands that run a model."""

from collections.abc import Callable
from typing import Any, TypeVar

import click

from data_pipeline.common.number_ranges import (
    COUNT,
    FEW,
    SEED,
    SHARE,
    SOME_SHARE,
    TEMPERATURE,
    TOP_K,
    Range,
)
from data_pipeline.text.codec import Direction, direction_of

_Function = TypeVar("_Function", bound=Callable[..., Any])

temperature_option = click.option(
    "--temperature",
    "--temp",
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
top_p_option = click.option(
    "--top-p",
    type=SOME_SHARE.option,
    default=1.0,
    show_default=True,
    help="Sample from the most likely tokens whose probabilities add up to this; 1: all.",
)
min_p_option = click.option(
    "--min-p",
    type=SHARE.option,
    default=0.0,
    show_default=True,
    help="Minimum probability of a token, relative to that of the most likely one.",
)
seed_option = click.option(
    "--seed",
    type=SEED.option,
    default=0,
    show_default=True,
    help="Seed of the random number generator.",
)


def direction_option_named(name: str, what: str) -> Callable[[_Function], _Function]:
    """An option for one direction of a model of both; `what` is its help."""
    return click.option(
        name,
        type=click.Choice([direction.value for direction in Direction]),
        callback=lambda _context, _option, direction: direction_of(direction),
        help=what,
    )


direction_option = direction_option_named(
    "--direction", "Direction in which a model of both is used. Default: backward."
)
device_option = click.option(
    "--device", help="Device: cpu, cuda, cuda:1, ... Default: cuda if there is one."
)
devices_option = click.option(
    "--device",
    help="Device: cpu, cuda:0, ..., or several with commas. Default: every GPU, or the CPU.",
)
dtype_option = click.option(
    "--dtype",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Data type of the weights; auto: bfloat16 on a GPU that computes in it, else float32.",
)
_SHORT_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}
GGUF_DTYPES = ("float16", "q8_0", "q6_k", "q5_k_m", "q4_k_m")
stored_dtype_option = click.option(
    "--dtype",
    "--outtype",
    type=click.Choice(["float32", "bfloat16", *GGUF_DTYPES, *_SHORT_DTYPES], case_sensitive=False),
    callback=lambda _context, _option, name: _SHORT_DTYPES.get(name, name),
    default="float32",
    show_default=True,
    help="Data type of the weights; those after bfloat16 are for gguf. f32, bf16 and f16 are short "
    "names, and q6_k, q5_k_m and q4_k_m need the package xllamacpp.",
)
server_option = click.option(
    "--server",
    metavar="URL",
    help="Server that has the model of DIR and computes: megaback serve, or vLLM. Its API key is "
    "read from OPENAI_API_KEY.",
)
server_model_option = click.option(
    "--server-model",
    metavar="NAME",
    help="Name of the model on the server. Default: its model of the format of DIR.",
)
cuda_graphs_option = click.option(
    "--cuda-graphs/--no-cuda-graphs",
    default=True,
    show_default=True,
    help="Generate with CUDA graphs, on a CUDA device.",
)


def max_new_tokens_option(default: int, per: str) -> Callable[[_Function], _Function]:
    """`--max-new-tokens`; `per` names the unit that the maximum is for."""
    return click.option(
        "--max-new-tokens",
        type=COUNT.option,
        default=default,
        show_default=True,
        help=f"Maximum number of new tokens per {per}.",
    )


def num_samples_option(
    default: int, what: str, allowed: Range = FEW
) -> Callable[[_Function], _Function]:
    """`-n`, `--num-samples`; `what` is its help."""
    return click.option(
        "-n",
        "--num-samples",
        type=allowed.option,
        default=default,
        show_default=True,
        help=what,
    )
