"""Sizes and budgets of a ladder, and the configs that follow from them."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from data_pipeline.errors import ConfigError
from megaback.config import ModelSection
from tests.helpers.tiny_run import tiny_config
from tools.direction_gap.ladder import Rung, Size, parse_budgets, parse_sizes, rungs_of


def test_sizes_and_budgets_are_read_in_their_order() -> None:
    assert parse_sizes("128x4, 64x2") == [Size(128, 4), Size(64, 2)]
    assert parse_budgets("300k,1.5M, 2048,1e6") == [300_000, 1_500_000, 2048, 10**6]


@pytest.mark.parametrize("text", ["", "64", "64x", "64x2,", "0x2", "64x0", "64x2x3", "-64x2"])
def test_a_wrong_size_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="WIDTHxLAYERS, such as"):
        parse_sizes(text)


@pytest.mark.parametrize("text", ["", "0", "3kk", "k", "-5", "300k,,600k"])
def test_a_wrong_budget_is_named(text: str) -> None:
    with pytest.raises(ConfigError, match="numbers of tokens, such as 300k"):
        parse_budgets(text)


def test_a_repeated_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="64x2 twice"):
        parse_sizes("64x2,128x2,64x2")
    with pytest.raises(ConfigError, match="300000 twice"):
        parse_budgets("300k,300000")


def shape(**fields: Any) -> ModelSection:
    return ModelSection(num_layers=2, width=64, **{"num_heads": 4, **fields}).resolved()


def test_heads_and_mlp_follow_the_width() -> None:
    overrides = Size(96, 3).overrides(shape(num_kv_heads=2))

    assert set(overrides) == {
        *("model.width=96", "model.num_layers=3", "model.num_heads=6", "model.num_kv_heads=3"),
        "model.mlp_width=null",
    }


def test_a_width_that_the_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"width 72 .* multiple of 16,"):
        Size(72, 2).overrides(shape())
    with pytest.raises(ConfigError, match=r"multiple of 32, .* 2 query heads per key head"):
        Size(80, 2).overrides(shape(num_kv_heads=2))


def test_a_fixed_mlp_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.mlp_width is 100 .* remove it"):
        Size(96, 2).overrides(shape(mlp_width=100))


@pytest.fixture
def config_of_ladder(tmp_path: Path, tiny_shards: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    fields = tiny_config(tiny_shards)
    del fields["model"]["num_kv_heads"]
    path.write_text(yaml.safe_dump({**fields, "run": str(tmp_path / "ladder")}))
    return path


def ladder(config: Path, sizes: str, budgets: str) -> list[Rung]:
    return rungs_of(config, (), parse_sizes(sizes), parse_budgets(budgets), 2)


def test_rungs_are_ordered_by_cost_and_have_folders_of_their_own(config_of_ladder: Path) -> None:
    rungs = ladder(config_of_ladder, "64x2,32x1", "10k,20k")

    assert [rung.name for rung in rungs] == ["32x1-10000", "32x1-20000", "64x2-10000", "64x2-20000"]
    # A step has 8 rows of 64 tokens.
    assert [rung.tokens for rung in rungs[:2]] == [20 * 512, 39 * 512]
    assert rungs[0].num_parameters < rungs[2].num_parameters
    assert rungs[-1].config.model.head_size == 8
    folder = config_of_ladder.parent / "ladder" / "64x2-20000"
    assert [run.folder for run in rungs[-1].runs] == [
        folder / f"seed-{seed}" / direction
        for seed in (3, 4)
        for direction in ("forward", "backward")
    ]


def test_rungs_and_seeds_measured_before_are_kept_without_training(config_of_ladder: Path) -> None:
    before = {(Size(32, 1), 10_000): [3, 7], (Size(64, 2), 20_000): [3]}
    asked = (parse_sizes("32x1"), parse_budgets("10k,40k"))

    rungs = rungs_of(config_of_ladder, (), *asked, 1, before)

    assert [
        (rung.name, [run.seed for run in rung.runs], [run.seed for run in rung.earlier_runs])
        for rung in rungs
    ] == [
        ("32x1-10000", [3, 3], [7, 7]),
        ("32x1-40000", [3, 3], []),
        ("64x2-20000", [], [3, 3]),
    ]


def test_budgets_within_the_warmup_or_a_step_of_another_are_refused(config_of_ladder: Path) -> None:
    with pytest.raises(ConfigError, match="10 steps of 512 tokens, not more than the 10 of the"):
        ladder(config_of_ladder, "32x1", "5k")
    with pytest.raises(ConfigError, match="same number of steps of 512 tokens"):
        ladder(config_of_ladder, "32x1", "10000,10001")
