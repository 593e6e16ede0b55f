"""Horizons: their steps and branches, and what is refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import assume, given
from hypothesis import strategies as st
from pydantic import ValidationError

from data_pipeline.errors import ConfigError
from megaback.config import Config, OptimizerSection
from megaback.config_file import load_config
from megaback.data import open_data
from megaback.horizons import (
    branch_config,
    branch_overrides,
    horizons_of,
    require_branch_points,
    with_trunk_steps,
)
from megaback.optim.lr_schedule import rate_factor_at
from megaback.planning.data_facts import run_facts
from megaback.run_folder import CHECKPOINTS_FOLDER, META_NAME, step_name
from tests.helpers.run_config import run_config

STEP_TOKENS = 4 * 64


def config_with(run: Path = Path("run"), *, decay_at: Any, **optimizer: Any) -> Config:
    section = {"learning_rate": 1e-3, "schedule": "wsd", "decay_at": decay_at, **optimizer}
    return run_config(run, optimizer=section, training={"seed": 1})


def written(tmp_path: Path, config: Config) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml())
    return path


def test_a_horizon_decays_over_the_fraction_of_its_own_steps() -> None:
    tokens = [100 * STEP_TOKENS, 1000.5 * STEP_TOKENS]

    first, last = horizons_of(config_with(decay_at=tokens, decay_fraction=0.25))

    assert (first.branch_step, first.steps) == (75, 100)
    assert (last.branch_step, last.steps) == (1001 - 250, 1001)


@pytest.mark.parametrize(
    ("tokens", "name"),
    [(2e9, "2e9"), (1.5e10, "1.5e10"), (25_600, "2.56e4")],
)
def test_a_branch_is_named_by_its_tokens(tokens: float, name: str) -> None:
    assert horizons_of(config_with(decay_at=[tokens]))[0].name == name


@given(
    steps=st.integers(2, 3000),
    fraction=st.floats(0.01, 0.99),
    ratio=st.floats(0, 1),
    warmup_steps=st.integers(0, 50),
)
def test_the_trunk_has_the_rates_of_each_run_alone_up_to_its_decay(
    steps: int, fraction: float, ratio: float, warmup_steps: int
) -> None:
    alone = OptimizerSection(
        learning_rate=1.0,
        schedule="wsd",
        decay_fraction=fraction,
        final_learning_rate_ratio=ratio,
        warmup_steps=warmup_steps,
    )
    branch_step = steps - alone.decay_steps(steps)
    assume(branch_step >= max(warmup_steps, 1))
    trunk = alone.model_copy(update={"decay_at": (1.0,)})

    for total in (branch_step, branch_step + 100):
        for step in {0, branch_step // 2, branch_step - 1}:
            assert rate_factor_at(step, total, trunk) == rate_factor_at(step, steps, alone)


def test_the_trunk_ends_where_the_last_decay_begins(tmp_path: Path) -> None:
    config = config_with(decay_at=[100 * STEP_TOKENS, 200 * STEP_TOKENS])
    path = written(tmp_path, config)

    trunk = load_config(path)

    assert trunk.training.steps == 160
    path.write_text(trunk.to_yaml())  # as a run's folder has it
    assert load_config(path) == trunk
    with pytest.raises(ConfigError, match=r"ends the trunk after 160 steps.*training.steps=null"):
        load_config(path, ("training.steps=200",))


def test_the_config_of_a_branch_is_that_of_the_run_alone(tmp_path: Path) -> None:
    config = config_with(tmp_path / "run", decay_at=[100 * STEP_TOKENS])
    path = written(tmp_path, config)
    (horizon,) = horizons_of(config)

    branch = load_config(path, branch_overrides(config, horizon))

    assert (branch.training.steps, branch.optimizer.decay_at) == (100, None)
    assert branch.run == tmp_path / "run/branches" / horizon.name
    assert branch.branch_from == tmp_path / "run/checkpoints/step-00000080"


def test_a_branch_of_a_trunk_with_lora_takes_its_weights_from_the_trunk_alone() -> None:
    config = config_with(decay_at=[100 * STEP_TOKENS])
    lora = {"init_from": "base", "finetune": {"lora": {"rank": 4}}}
    trunk = Config.model_validate(config.model_dump() | lora)

    branch = branch_config(trunk, horizons_of(trunk)[0])

    assert (branch.init_from, branch.finetune) == (None, trunk.finetune)


def test_copies_of_branches_are_apart_from_those_of_the_trunk(tmp_path: Path) -> None:
    config = config_with(tmp_path / "run", decay_at=[100 * STEP_TOKENS])
    checkpoint = config.checkpoint.model_copy(update={"copy_to": "s3://bucket/runs/"})
    config = config.model_copy(update={"checkpoint": checkpoint})

    overrides = branch_overrides(config, horizons_of(config)[0])

    assert "checkpoint.copy_to=s3://bucket/runs/run-branches" in overrides


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        ({"decay_at": [256], "decay_fraction": 1.0}, "0 are left for a warmup of 0 and at least"),
        ({"decay_at": [100 * STEP_TOKENS], "warmup_steps": 81}, "left for a warmup of 81"),
        ({"decay_at": [25_500, 25_600]}, "end at the same step, 100"),
    ],
)
def test_horizons_that_are_too_near_are_refused(optimizer: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        horizons_of(config_with(**optimizer))


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"optimizer": {"schedule": "cosine"}}, "decay_at is for schedule wsd only"),
        ({"optimizer": {"decay_at": [2e5, 1e5]}}, "each above the last"),
        ({"optimizer": {"decay_at": []}}, "one or more numbers"),
        ({"training": {"epochs": 2}}, "decay_at and training.epochs exclude each other"),
        ({"validation": {"patience": 2, "every_steps": 1}}, "decay_at and validation.patience"),
        ({"branch_from": "trunk"}, "decay_at and branch_from"),
    ],
)
def test_what_horizons_exclude_is_refused(sections: dict[str, Any], words: str) -> None:
    fields = yaml.safe_load(config_with(decay_at=[1e5]).to_yaml())
    for key, section in sections.items():
        fields[key] = fields[key] | section if isinstance(section, dict) else section

    with pytest.raises(ValidationError, match=words):
        Config.model_validate(fields)


def test_a_horizon_that_its_trunk_has_passed_is_refused(tmp_path: Path) -> None:
    config = config_with(tmp_path, decay_at=[100 * STEP_TOKENS, 200 * STEP_TOKENS])
    first, last = horizons_of(config)
    for horizon in (last, first):
        target = tmp_path / CHECKPOINTS_FOLDER / step_name(horizon.branch_step)
        target.mkdir(parents=True)
        (target / META_NAME).touch()

    require_branch_points(config)
    (target / META_NAME).unlink()
    with pytest.raises(ConfigError, match=r"begins at step 80, of which .* no checkpoint"):
        require_branch_points(config)


@pytest.mark.parametrize(
    "use",
    [
        pytest.param(lambda config: open_data(config, 0, 1), id="training"),
        pytest.param(lambda config: run_facts(config, None, None), id="plan"),
    ],
)
def test_data_that_ends_before_the_last_horizon_is_refused(
    tmp_path: Path, tiny_shards: Path, use: Callable[[Config], object]
) -> None:
    """Even where it lasts for the trunk: the branch would end before its horizon."""
    data = {"shards": [{"path": str(tiny_shards), "max_epochs": 1}]}
    longest = open_data(run_config(tmp_path, data=data, training={"steps": 10**6}), 0, 1)

    def use_with(steps: int) -> None:
        fields = config_with(tmp_path, decay_at=[steps * STEP_TOKENS]).model_dump(mode="json")
        use(with_trunk_steps(Config.model_validate(fields | {"data": data})))

    use_with(longest.total_steps)
    with pytest.raises(ConfigError, match="raise max_epochs, or use earlier horizons"):
        use_with(longest.total_steps + 1)
