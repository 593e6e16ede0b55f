"""The configs in `configs/`."""

import math
from pathlib import Path

import pytest
import torch

from megaback.config import Config
from megaback.config_batch import split_batch
from megaback.config_file import load_config
from megaback.model.gpt import ReverseGPT
from tests.helpers.paths import ROOT

CONFIGS = ROOT / "configs"
SHIPPED = sorted(path.name for path in CONFIGS.glob("*.yaml"))
SEED_CONFIG = "xcoax_100bt.yaml"


@pytest.mark.parametrize(("name", "billions"), [("1b", 1.0), ("2b", 2.0), ("7b", 7.0)])
def test_a_model_has_the_number_of_parameters_in_its_configs_name(
    name: str, billions: float
) -> None:
    shape = load_config(CONFIGS / f"reverse_{name}.yaml").model
    with torch.device("meta"):
        model = ReverseGPT(shape, 8_888)

    assert model.num_parameters() == pytest.approx(billions * 1e9, rel=0.04)
    assert shape.head_size == 128


def shipped(name: str) -> Config:
    """A shipped config; the one for fine-tuning gets the shape of its base, which is not here."""
    keys = ("num_layers=12", "width=1024", "num_heads=16") if name == "backchat.yaml" else ()
    return load_config(CONFIGS / name, tuple(f"model.{key}" for key in keys))


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_config_parses(name: str) -> None:
    shipped(name)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_context_is_a_power_of_two_as_frames_are(name: str) -> None:
    context_tokens = shipped(name).batch.context_tokens

    assert 64 <= context_tokens <= 65_536
    assert context_tokens & (context_tokens - 1) == 0


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_batch_is_divisible_by_1_2_4_and_8_ranks(name: str) -> None:
    batch = shipped(name).batch

    for world_size in (1, 2, 4, 8):
        micro_rows, accumulation = split_batch(batch, world_size)
        assert micro_rows * accumulation * world_size == batch.global_batch_rows


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_warmup_ends_before_the_run_does(name: str) -> None:
    config = shipped(name)

    assert config.optimizer.warmup_steps < (config.training.steps or math.inf)


@pytest.mark.parametrize("name", SHIPPED)
def test_no_shipped_config_has_an_absolute_path(name: str) -> None:
    config: Config = shipped(name)

    assert not config.run.is_absolute()
    assert not any(Path(part.path).is_absolute() for part in config.data.shards)


def test_the_seed_experiments_config_has_its_numbers() -> None:
    config = load_config(CONFIGS / SEED_CONFIG)

    assert (config.model.num_layers, config.model.num_heads, config.model.width) == (12, 16, 1024)
    assert (config.batch.context_tokens, config.batch.micro_batch_rows) == (1024, 64)
    assert config.batch.global_batch_rows == 64 * 4
    assert config.optimizer.learning_rate == 3e-4
    assert config.training.precision == "bf16"
    assert config.data.direction == "backward"


def test_the_seed_experiments_batch_accumulates_four_times_on_one_device() -> None:
    assert split_batch(load_config(CONFIGS / SEED_CONFIG).batch, 1) == (64, 4)
