import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from data_pipeline.errors import CheckpointCorruptError, RunMismatchError
from megaback.checkpoints.checkpoint import CheckpointMeta
from megaback.checkpoints.frozen_weights import (
    keep_frozen,
    link_frozen,
    open_frozen,
    require_shapes,
    write_frozen,
)
from megaback.checkpoints.safetensors_file import size_and_hash
from megaback.faults.start_fence import NO_FENCE

SHAPES = {"one": (2, 3), "two": (4,)}


def write(run: Path) -> tuple[Path, tuple[int, str]]:
    """The run's frozen weights, and their size and hash."""
    run.mkdir()
    entry = write_frozen(run, SHAPES, lambda name: torch.full(SHAPES[name], len(name) / 7))
    return run / "checkpoints" / "base.safetensors", entry


def test_weights_are_written_once_and_linked_by_checkpoints(tmp_path: Path) -> None:
    path, entry = write(tmp_path / "run")
    target = path.parent / "step-00000001"
    target.mkdir()

    link_frozen(path, target / path.name)

    assert path.samefile(target / path.name)
    assert size_and_hash(path) == entry
    assert sorted(one.name for one in target.iterdir()) == [path.name]


def test_weights_are_copied_where_there_are_no_links(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_paths: object) -> None:
        raise OSError(1, "Operation not permitted")

    path, entry = write(tmp_path / "run")
    monkeypatch.setattr(os, "link", refuse)

    link_frozen(path, tmp_path / "copy")

    assert not path.samefile(tmp_path / "copy")
    assert size_and_hash(tmp_path / "copy") == entry


def test_a_run_keeps_those_of_the_checkpoint_that_it_continues(
    tmp_path: Path, meta_at: Callable[..., CheckpointMeta]
) -> None:
    path, entry = write(tmp_path / "trunk")
    meta = replace(meta_at(1), files={path.name: entry})
    (tmp_path / "branch").mkdir()

    assert keep_frozen(tmp_path / "branch", path.parent, meta, NO_FENCE) == entry

    assert size_and_hash(tmp_path / "branch" / "checkpoints" / path.name) == entry
    kept = open_frozen(path.parent, meta)
    require_shapes(path.parent, kept, SHAPES)
    with pytest.raises(CheckpointCorruptError, match="does not match the model of its config"):
        require_shapes(path.parent, kept, {**SHAPES, "two": (5,)})


def test_a_checkpoint_without_frozen_weights_is_refused(
    tmp_path: Path, meta_at: Callable[..., CheckpointMeta]
) -> None:
    with pytest.raises(RunMismatchError, match="use init_from="):
        open_frozen(tmp_path, meta_at(1))
