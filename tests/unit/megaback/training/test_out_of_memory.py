"""The message of a rank whose device is out of memory names what needs less."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from megaback.config import Config
from megaback.distributed.world import World
from megaback.training.out_of_memory import device_memory_error


@pytest.fixture(autouse=True)
def _rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")


def message(
    shards: Path,
    rows: int,
    kept: str,
    stage: int,
    written: Sequence[Path] = (),
    context_tokens: int = 64,
    **training: Any,
) -> str:
    fields: dict[str, Any] = {
        "run": "run",
        "data": {"shards": str(shards)},
        "model": {"num_layers": 2, "width": 32, "num_heads": 4},
        "batch": {
            "context_tokens": context_tokens,
            "global_batch_rows": 8,
            "micro_batch_rows": rows,
        },
        "optimizer": {"learning_rate": 1e-3},
        "training": {"steps": 10, "activation_checkpointing": kept, **training},
        "zero": {"stage": stage},
    }
    world = World(1, 2, torch.device("cpu"), None)
    config = Config.model_validate(fields)
    return str(device_memory_error(config, world, "9 GiB failed", written))


def test_it_names_rank_allocation_keys_and_plan(tiny_shards: Path) -> None:
    said = message(tiny_shards, 4, "none", 2)

    assert said.startswith("rank 1 on ")
    assert "is out of memory: 9 GiB failed on cpu, which has " in said
    assert "`megaback plan` estimates 0.0 GB for a rank" in said
    assert "lower batch.micro_batch_rows (a forward pass has 4 rows)" in said
    assert "set training.activation_checkpointing to selective or block" in said
    assert said.endswith("raise zero.stage, and run the same command again to resume")


@pytest.mark.parametrize(
    ("rows", "kept", "stage", "absent"),
    [
        (1, "none", 2, "batch.micro_batch_rows"),
        (4, "block", 2, "training.activation_checkpointing"),
        (4, "none", 3, "raise zero.stage"),
    ],
)
def test_it_advises_nothing_that_is_done_already(
    tiny_shards: Path, rows: int, kept: str, stage: int, absent: str
) -> None:
    assert absent not in message(tiny_shards, rows, kept, stage)


def test_ranks_of_a_node_can_share_a_row_that_is_too_long(
    tiny_shards: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    advice = "set batch.sequence_parallel to 2"
    assert advice not in message(tiny_shards, 1, "block", 2, context_tokens=8_192)

    monkeypatch.setenv("LOCAL_SIZE", "2")

    assert advice in message(tiny_shards, 1, "block", 2, context_tokens=8_192)
    assert advice not in message(tiny_shards, 4, "block", 2, context_tokens=8_192)
    assert advice not in message(tiny_shards, 1, "block", 2, context_tokens=4_096)


def test_it_needs_no_data_set(tmp_path: Path) -> None:
    said = message(tmp_path / "nothing", 4, "none", 2)

    assert "megaback plan" not in said
    assert "batch.micro_batch_rows" in said


def test_it_names_the_files_about_the_memory_and_how_to_read_them(tmp_path: Path) -> None:
    written = [tmp_path / "rank-00001.txt", tmp_path / "rank-00001.pickle"]

    said = message(tmp_path, 4, "none", 2, written)
    recorded = message(tmp_path, 4, "none", 2, written, memory_history=True)

    assert f" ({written[0]} and {written[1]} have the state of its memory; " in said
    assert said.endswith("without an upload, and with training.memory_history its history)")
    assert recorded.endswith("in the browser, without an upload)")
    assert "memory_viz" not in message(tmp_path, 4, "none", 2, written[:1])
