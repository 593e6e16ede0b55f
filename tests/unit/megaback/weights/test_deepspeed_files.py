"""DeepSpeed's checkpoints as untrusted files: found, and unpickled without running code."""

import os
import pickle
from collections import OrderedDict
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError
from megaback.weights.deepspeed_files import checkpoint_folder, is_deepspeed, load, model_files

NAME = "mp_rank_00_model_states.pt"


class Harmful:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.path}",)


def test_a_file_that_would_run_code_is_refused_by_what_it_contains(tmp_path: Path) -> None:
    torch.save({"module": OrderedDict(), "other": Harmful(tmp_path / "ran")}, tmp_path / NAME)

    with pytest.raises(CheckpointCorruptError) as caught:
        load(tmp_path / NAME)

    assert "posix.system" in str(caught.value)
    assert "save_pretrained" in str(caught.value)
    assert not (tmp_path / "ran").exists()


def test_damaged_and_foreign_files_are_reported(tmp_path: Path) -> None:
    torch.save({"module": OrderedDict(weight=torch.zeros(1000))}, tmp_path / NAME)
    whole = (tmp_path / NAME).read_bytes()
    for content in (whole[:-100], b"", pickle.dumps(1), b"not a file"):
        (tmp_path / NAME).write_bytes(content)
        with pytest.raises(CheckpointCorruptError, match=NAME):
            load(tmp_path / NAME)


def test_the_checkpoint_that_latest_names_is_found(tmp_path: Path) -> None:
    (tmp_path / "global_step3").mkdir()
    torch.save({}, tmp_path / "global_step3" / NAME)
    (tmp_path / "latest").write_text("global_step3\n")

    assert checkpoint_folder(tmp_path) == tmp_path / "global_step3"
    assert is_deepspeed(tmp_path)
    (tmp_path / "latest").write_text("../global_step3")
    with pytest.raises(CheckpointCorruptError, match="does not name a checkpoint"):
        checkpoint_folder(tmp_path)
    assert not is_deepspeed(tmp_path)
    with pytest.raises(CheckpointMissingError, match="is not a checkpoint of DeepSpeed"):
        checkpoint_folder(tmp_path.parent)


def test_missing_ranks_and_tensor_parallelism_are_refused(tmp_path: Path) -> None:
    for rank in (0, 2):
        (tmp_path / f"zero_pp_rank_{rank}_{NAME}").touch()
    with pytest.raises(CheckpointCorruptError, match="file of rank 1 is missing"):
        model_files(tmp_path)

    (tmp_path / "mp_rank_01_model_states.pt").touch()

    with pytest.raises(CheckpointCorruptError, match="tensor parallelism"):
        model_files(tmp_path)
