from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from megaback.config import Config
from megaback.config_finetune import FinetuneSection
from tests.helpers.run_config import run_config

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def lora(**fields: object) -> FinetuneSection:
    return FinetuneSection.model_validate({"lora": fields})


def test_all_weights_are_trained_by_default() -> None:
    assert FinetuneSection().adapters is None
    assert lora(rank=8).adapters is not None


def test_alpha_is_twice_the_rank_by_default() -> None:
    assert lora(rank=8).lora.scale == 2
    assert lora(rank=8, alpha=4).lora.scale == 0.5


@pytest.mark.parametrize("given", ["all-linear", ["all-linear"], ["q_proj", "all-linear"]])
def test_all_linear_means_the_seven_matrices_of_a_block(given: object) -> None:
    assert lora(rank=8, target_modules=given).lora.target_modules == ALL


def test_target_modules_are_in_the_models_order_and_once() -> None:
    given = ["down_proj", "q_proj", "down_proj"]

    assert lora(rank=8, target_modules=given).lora.target_modules == ("q_proj", "down_proj")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"alpha": 8}, "alpha is for LoRA, which needs a rank"),
        ({"target_modules": ["k_proj"]}, "target_modules is for LoRA, which needs a rank"),
        ({"rank": 8, "target_modules": []}, "give at least one module"),
        ({"rank": 8, "target_modules": ["lm_head"]}, "'down_proj' or 'all-linear'"),
        ({"rank": 0}, "greater than or equal to 1"),
    ],
)
def test_what_does_not_fit_is_refused(fields: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        lora(**fields)


def test_lora_needs_a_base_and_adamw() -> None:
    finetune = {"lora": {"rank": 4}}
    with pytest.raises(ValidationError, match="needs init_from too"):
        run_config(Path("run"), finetune=finetune)
    muon = {"name": "muon", "learning_rate": 1e-3}
    with pytest.raises(ValidationError, match="muon is for whole matrices"):
        run_config(Path("run"), finetune=finetune, init_from="base", optimizer=muon)
    assert (
        run_config(Path("run"), finetune=finetune, branch_from="trunk").finetune.adapters
        is not None
    )


def test_a_config_with_lora_is_read_as_it_was_written() -> None:
    given = run_config(
        Path("run"),
        finetune={"lora": {"rank": 4, "target_modules": "all-linear"}},
        init_from="base",
    )

    assert Config.model_validate(yaml.safe_load(given.to_yaml())) == given
