"""Adapters of PEFT, made without it: merging, and refusals by name."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from data_pipeline.errors import CheckpointCorruptError, MegabackError, RunMismatchError
from data_pipeline.text.codec import TextCodec
from megaback.checkpoints.safetensors_file import write_tensors
from megaback.origins import WeightsIdentity
from megaback.weights.peft_adapter import BASE_SHA256, merged_with
from megaback.weights.source import WeightSource, open_source
from tests.helpers.models import random_model, write_model

Q_PROJ = "base_model.model.model.layers.1.self_attn.q_proj"
IDENTITY = WeightsIdentity(path="base", sha256="ab" * 32)
CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 4,
    "lora_alpha": 6,
    "target_modules": ["q_proj"],
    "bias": "none",
    "rank_pattern": {},
    "modules_to_save": None,
    "use_dora": False,
    "lora_dropout": 0.1,
}


@pytest.fixture
def base(tmp_path: Path, codec: Callable[..., TextCodec]) -> WeightSource:
    return open_source(write_model(tmp_path / "base", random_model(), codec()))


def write_adapter(
    folder: Path, tensors: dict[str, Tensor] | None = None, sha256: str | None = None, **more: Any
) -> Path:
    """Write an adapter of rank 4 of a matrix of 16 x 16."""
    if tensors is None:
        generator = torch.Generator().manual_seed(3)
        tensors = {
            f"{Q_PROJ}.lora_A.weight": torch.randn(4, 16, generator=generator),
            f"{Q_PROJ}.lora_B.weight": torch.randn(16, 4, generator=generator),
        }
    folder.mkdir()
    specs = {name: (one.dtype, one.shape) for name, one in tensors.items()}
    metadata = {} if sha256 is None else {BASE_SHA256: sha256}
    write_tensors(folder / "adapter_model.safetensors", specs, tensors.__getitem__, metadata)
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | more))
    return folder


@pytest.mark.parametrize(
    ("more", "scale"), [({}, 1.5), ({"use_rslora": True}, 3.0), ({"lora_alpha": 2.5}, 0.625)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_added_to_its_matrix_alone(
    more: dict[str, Any], scale: float, dtype: torch.dtype, tmp_path: Path, base: WeightSource
) -> None:
    factors = {
        f"{Q_PROJ}.lora_A.weight": torch.eye(4, 16, dtype=dtype),
        f"{Q_PROJ}.lora_B.weight": torch.eye(16, 4, dtype=dtype),
    }
    folder = write_adapter(tmp_path / "adapter", factors, **more)

    merged = merged_with(folder, base, IDENTITY)

    changed = torch.zeros(16, 16)
    changed[range(4), range(4)] = scale
    for name in base.shapes:
        expected = base.read(name)
        if name == "model.layers.1.self_attn.q_proj.weight":
            expected = expected + changed
        assert torch.equal(merged.read(name), expected)
    assert merged.description.val_loss is None


@pytest.mark.parametrize(
    ("more", "parts"),
    [
        ({"use_dora": True}, ["'use_dora': True", "merge_and_unload"]),
        ({"peft_type": "IA3"}, ["'IA3'"]),
        ({"bias": "all"}, ["'bias'"]),
        ({"rank_pattern": {"q_proj": 8}}, ["'rank_pattern'"]),
        ({"modules_to_save": ["lm_head"]}, ["'modules_to_save'"]),
        ({"init_lora_weights": "pissa"}, ["'pissa'"]),
        ({"of_a_later_version": 3}, ["'of_a_later_version'"]),
    ],
)
def test_what_is_not_plain_lora_is_refused_by_name(
    more: dict[str, Any], parts: list[str], tmp_path: Path, base: WeightSource
) -> None:
    with pytest.raises(RunMismatchError) as refused:
        merged_with(write_adapter(tmp_path / "adapter", **more), base, IDENTITY)
    for part in parts:
        assert part in str(refused.value)


@pytest.mark.parametrize(
    ("tensors", "part"),
    [
        ({f"{Q_PROJ}.lora_A.weight": torch.zeros(4, 16)}, "lora_B.weight"),
        ({f"{Q_PROJ}.lora_A.weight": torch.zeros(3, 16)}, "[3, 16]"),
        ({"base_model.model.model.norm.lora_A.weight": torch.zeros(4, 16)}, "norm.lora_A"),
        ({"base_model.model.lm_head.weight": torch.zeros(600, 16)}, "lm_head.weight"),
        ({"model.layers.9.mlp.up_proj.lora_A.weight": torch.zeros(4, 16)}, "layers.9"),
    ],
)
def test_factors_that_do_not_fit_the_base_are_refused(
    tensors: dict[str, Tensor], part: str, tmp_path: Path, base: WeightSource
) -> None:
    with pytest.raises(RunMismatchError) as refused:
        merged_with(write_adapter(tmp_path / "adapter", tensors), base, IDENTITY)
    assert part in str(refused.value)


def test_another_base_than_the_recorded_one_is_refused(tmp_path: Path, base: WeightSource) -> None:
    merged_with(write_adapter(tmp_path / "same", sha256=IDENTITY.sha256), base, IDENTITY)

    with pytest.raises(RunMismatchError, match="cdcdcdcdcdcd"):
        merged_with(write_adapter(tmp_path / "other", sha256="cd" * 32), base, IDENTITY)


@pytest.mark.parametrize(
    ("config", "part"),
    [
        ("[]", "is not an object"),
        ("{", "adapter_config.json"),
        ('{"r": 0, "lora_alpha": 1}', "r is 0"),
        ('{"r": 1e9, "lora_alpha": 1}', "r is 1000000000.0"),
        ('{"r": 4, "lora_alpha": "x"}', "lora_alpha is 'x'"),
    ],
)
def test_a_damaged_config_is_an_error(
    config: str, part: str, tmp_path: Path, base: WeightSource
) -> None:
    folder = write_adapter(tmp_path / "adapter")
    (folder / "adapter_config.json").write_text(config)
    with pytest.raises(CheckpointCorruptError) as refused:
        merged_with(folder, base, IDENTITY)
    assert part in str(refused.value)


def test_damaged_weights_are_errors(tmp_path: Path, base: WeightSource) -> None:
    nan = {
        f"{Q_PROJ}.lora_A.weight": torch.full((4, 16), torch.nan),
        f"{Q_PROJ}.lora_B.weight": torch.zeros(16, 4),
    }
    for name, tensors in (("nan", nan), ("none", {})):
        with pytest.raises(CheckpointCorruptError):
            merged_with(write_adapter(tmp_path / name, tensors), base, IDENTITY)
    for content in (None, b"pickle"):
        folder = write_adapter(tmp_path / f"cut{content}")
        path = folder / "adapter_model.safetensors"
        path.unlink() if content is None else path.write_bytes(content)
        with pytest.raises(MegabackError, match=r"adapter_model\.safetensors"):
            merged_with(folder, base, IDENTITY)
