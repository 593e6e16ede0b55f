"""Rungs of a ladder: the direction gap at several model sizes and token budgets.

A rung is an ordinary direction gap in a folder of its own, RUN/WIDTHxLAYERS-TOKENS, whose runs can
also be trained elsewhere. Its config follows from the ladder's: heads by the size of a head, MLP by
the width, steps by the budget. Loads no torch.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TypeVar

from data_pipeline.common.number_ranges import LAYERS, PLANNED_TOKENS, SIZE
from data_pipeline.common.short_numbers import short_number
from data_pipeline.errors import ConfigError
from megaback.config import Config, ModelSection
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.planning.flops import ModelSize
from tools.direction_gap.runs import ArrowRun, runs_of, runs_of_seeds

_SIZE = re.compile(r"(\d+)x(\d+)")
_Value = TypeVar("_Value", "Size", int)


@dataclass(frozen=True)
class Size:
    """Size of a model."""

    width: int
    """Size of the residual stream, in channels."""
    num_layers: int

    def __str__(self) -> str:
        return f"{self.width}x{self.num_layers}"

    def overrides(self, shape: ModelSection) -> tuple[str, ...]:
        """Overrides of a config whose model is `shape`. Raises ConfigError."""
        group = shape.num_heads // shape.kv_heads
        unit = Fraction(shape.width, shape.num_heads) * group
        if self.width % unit:
            per_group = f" times {group} query heads per key head" if group > 1 else ""
            raise ConfigError(
                f"width {self.width} of `sizes` is not a multiple of {unit}, the width per head of "
                f"the config{per_group}; choose another width, or change model.num_heads"
            )
        if shape.mlp_width != shape.model_copy(update={"mlp_width": None}).hidden_mlp_width:
            raise ConfigError(
                f"model.mlp_width is {shape.mlp_width} at every width of `sizes`; remove it, so "
                "that it follows the width"
            )
        num_heads = int(self.width / unit) * group
        return (
            f"model.width={self.width}",
            f"model.num_layers={self.num_layers}",
            f"model.num_heads={num_heads}",
            f"model.num_kv_heads={num_heads // group}",
            "model.mlp_width=null",
        )


def parse_sizes(text: str) -> list[Size]:
    """Sizes such as `64x2,128x4`: width and number of layers. Raises ConfigError."""
    sizes = []
    for word in text.split(","):
        found = _SIZE.fullmatch(word.strip())
        size = Size(int(found[1]), int(found[2])) if found else None
        if size is None or SIZE.problem(size.width) or LAYERS.problem(size.num_layers):
            raise ConfigError(
                f"`sizes` has {word.strip()!r}; give WIDTHxLAYERS, such as 128x4, separated by "
                "commas"
            )
        sizes.append(size)
    return _distinct(sizes, "sizes")


def parse_budgets(text: str) -> list[int]:
    """Numbers of training tokens such as `300k,1.5M`. Raises ConfigError."""
    budgets = []
    for word in text.split(","):
        tokens = round(short_number(word) or 0)
        if PLANNED_TOKENS.problem(tokens):
            raise ConfigError(
                f"`budgets` has {word.strip()!r}; give numbers of tokens, such as 300k or 1.5M, "
                "separated by commas"
            )
        budgets.append(tokens)
    return _distinct(budgets, "budgets")


def _distinct(values: list[_Value], name: str) -> list[_Value]:
    for value in values:
        if values.count(value) > 1:
            raise ConfigError(f"`{name}` has {value} twice; give each once")
    return values


@dataclass(frozen=True)
class Rung:
    """One model size trained on one number of tokens."""

    size: Size
    config: Config
    """Config of its runs, in all but seed and direction."""
    overrides: tuple[str, ...]
    """Overrides of the ladder's config."""
    num_parameters: int
    runs: list[ArrowRun]
    """Runs to train: none of a rung that only an earlier command asked for."""
    earlier_runs: list[ArrowRun] = field(default_factory=list)
    """Runs of seeds that only an earlier command asked for."""

    @property
    def name(self) -> str:
        """Name of its folder."""
        return self.config.run.name

    @property
    def tokens(self) -> int:
        """Number of tokens that each model is trained on: the budget in whole steps."""
        return (self.config.training.steps or 0) * tokens_per_step(self.config)


def tokens_per_step(config: Config) -> int:
    return config.batch.global_batch_rows * config.batch.context_tokens


def rungs_of(
    config: Path,
    overrides: tuple[str, ...],
    sizes: Sequence[Size],
    budgets: Sequence[int],
    num_seeds: int,
    earlier: Mapping[tuple[Size, int], Collection[int]] | None = None,
) -> list[Rung]:
    """All sizes with all budgets, and all rungs of `earlier`, the cheapest first.

    `earlier`: seeds that were measured before, by size and budget. Raises ConfigError, and the
    errors of `open_data`.
    """
    base, earlier = load_config(config, overrides), earlier or {}
    vocab_size = open_data(base.undivided(), 0, 1).codec.vocab_size
    asked = [(size, budget) for size in sizes for budget in budgets]
    places = [*asked, *(place for place in earlier if place not in asked)]
    of_budgets = {budget: _steps(base, budget) for _, budget in places}
    if len(set(of_budgets.values())) < len(of_budgets):
        raise ConfigError(
            f"two of `budgets` are the same number of steps of {tokens_per_step(base):,} tokens; "
            "give budgets that differ by a step or more, also from those measured before"
        )
    rungs = []
    for size, budget in places:
        own = (
            *size.overrides(base.model),
            f"training.steps={of_budgets[budget]}",
            "training.epochs=null",
            f"run={base.run / f'{size}-{budget}'}",
        )
        settings = load_config(config, (*overrides, *own))
        runs = runs_of(settings, num_seeds) if (size, budget) in asked else []
        seeds = set(earlier.get((size, budget), ())) - {run.seed for run in runs}
        num_parameters = ModelSize.of(settings.model, vocab_size).total
        rungs.append(
            Rung(size, settings, own, num_parameters, runs, runs_of_seeds(settings, seeds))
        )
    return sorted(rungs, key=lambda rung: rung.num_parameters * rung.tokens)


def _steps(config: Config, budget: int) -> int:
    """Number of steps nearest to a budget. Raises ConfigError."""
    steps = round(budget / tokens_per_step(config))
    if steps <= config.optimizer.warmup_steps:
        raise ConfigError(
            f"{budget} of `budgets` is {steps} steps of {tokens_per_step(config):,} tokens, not "
            f"more than the {config.optimizer.warmup_steps} of the warmup; give a larger budget, "
            "or lower optimizer.warmup_steps or batch.global_batch_rows"
        )
    return steps
