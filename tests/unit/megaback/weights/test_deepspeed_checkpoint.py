"""Layouts of DeepSpeed's checkpoints: prefixes, padding, and what is missing.

test_import_model.py reads those that DeepSpeed has written.
"""

from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from data_pipeline.errors import CheckpointCorruptError
from megaback.weights.deepspeed_checkpoint import DeepSpeedWeights

EMBEDDING, NORM = "model.embed_tokens.weight", "model.norm.weight"
SHAPES = OrderedDict({EMBEDDING: torch.Size([5, 3]), NORM: torch.Size([3])})


def save_model(folder: Path, name: str = "mp_rank_00_model_states.pt", **fields: Any) -> None:
    plain = {"module": {}, "buffer_names": [], "param_shapes": [SHAPES], "shared_params": {}}
    torch.save({**plain, "global_steps": 7, **fields}, folder / name)


def save_parts(folder: Path, *parts: torch.Tensor, ranks: int = 2, **fields: Any) -> None:
    for rank, part in enumerate(parts):
        state = {"zero_stage": 2, "partition_count": [ranks], **fields}
        state["single_partition_of_fp32_groups"] = [part]
        torch.save(
            {"optimizer_state_dict": state},
            folder / f"zero_pp_rank_{rank}_mp_rank_00_optim_states.pt",
        )


@pytest.mark.parametrize("prefix", ["module.", "module.model.", "_orig_mod."])
def test_prefixes_of_wrappers_are_removed(prefix: str, tmp_path: Path) -> None:
    weights = {name: torch.rand(size) for name, size in SHAPES.items()}
    module = {prefix + name: weight for name, weight in weights.items()}
    save_model(
        tmp_path,
        module={**module, "lora": torch.ones(2), "buffer": torch.ones(1)},
        buffer_names=["buffer"],
        shared_params={f"{prefix}lm_head.weight": prefix + EMBEDDING},
    )

    read = DeepSpeedWeights(tmp_path)

    shapes = dict(read.shapes())
    assert shapes.keys() == {EMBEDDING, NORM, "lm_head.weight", "lora"}  # the last is left over
    assert torch.equal(read.read(EMBEDDING), weights[EMBEDDING])
    assert torch.equal(read.read("lm_head.weight"), weights[EMBEDDING])
    assert (read.step, read.kind) == (7, "DeepSpeed, without optimizer state")


def test_parameters_lie_across_partitions_with_padding_between_them(tmp_path: Path) -> None:
    save_model(tmp_path)
    flat = torch.arange(20.0)  # 15 of the embedding, 1 between, 3 of the norm, 1 at the end
    save_parts(tmp_path, flat[:10], flat[10:], param_alignment_paddings=[[1, 0]])

    read = DeepSpeedWeights(tmp_path)

    assert torch.equal(read.read(EMBEDDING), flat[:15].view(5, 3))
    assert torch.equal(read.read(NORM), flat[16:19])


def test_missing_ranks_and_parts_are_reported(tmp_path: Path) -> None:
    save_model(tmp_path)
    save_parts(tmp_path, torch.zeros(10))
    with pytest.raises(CheckpointCorruptError, match="files of 1 of 2 ranks"):
        DeepSpeedWeights(tmp_path)
    save_parts(tmp_path, torch.zeros(10), torch.zeros(4))
    with pytest.raises(CheckpointCorruptError, match="sizes of its parameters"):
        DeepSpeedWeights(tmp_path)


def test_another_layout_is_refused(tmp_path: Path) -> None:
    torch.save([1], tmp_path / "mp_rank_00_model_states.pt")
    with pytest.raises(CheckpointCorruptError, match=r"another layout.*zero_to_fp32"):
        DeepSpeedWeights(tmp_path)
    save_model(tmp_path)
    torch.save({"optimizer_state_dict": {}}, tmp_path / "zero_pp_rank_0_mp_rank_00_optim_states.pt")
    with pytest.raises(CheckpointCorruptError, match="partition_count"):
        DeepSpeedWeights(tmp_path)
    (tmp_path / "zero").mkdir()
    with pytest.raises(CheckpointCorruptError, match=r"fp32\.pt is missing"):
        DeepSpeedWeights(tmp_path)


def test_weights_without_optimizer_state_at_stage_3_are_incomplete(tmp_path: Path) -> None:
    save_model(tmp_path, "zero_pp_rank_0_mp_rank_00_model_states.pt", module={NORM: torch.zeros(0)})
    with pytest.raises(CheckpointCorruptError, match=r"optim_states\.pt are missing"):
        DeepSpeedWeights(tmp_path)
