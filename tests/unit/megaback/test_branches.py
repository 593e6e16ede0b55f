"""The point at which a branch leaves its trunk, and what it refuses to continue."""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    MegabackError,
    RunMismatchError,
)
from megaback.branches import BranchPoint, branches_of, find_branch_point, recorded_branch_point
from megaback.config import ALL_KEPT, Config
from megaback.run_folder import CHECKPOINTS_FOLDER, META_NAME, step_name
from tests.helpers.run_config import run_config

FORMAT = {"direction": "backward", "unit": "token", "tokenizer_sha256": "0" * 64}


def saved(config: Config, step: int, branch: BranchPoint | None = None) -> Path:
    """A checkpoint's folder, with what a branch reads of its meta.json."""
    target = config.run / CHECKPOINTS_FOLDER / step_name(step)
    target.mkdir(parents=True)
    fields = {
        "step": step,
        "updates": step - 1,
        "config": config.model_dump(mode="json"),
        "data_fingerprint": "f" * 64,
        "text_format": FORMAT,
        "branch": None if branch is None else asdict(branch),
    }
    (target / META_NAME).write_text(json.dumps(fields))
    return target


def branch_config(tmp_path: Path, branch_from: Path, **sections: Any) -> Config:
    return run_config(tmp_path / "branch", branch_from=branch_from, **sections)


def test_a_run_without_a_trunk_is_no_branch(tmp_path: Path) -> None:
    assert find_branch_point(run_config(tmp_path)) is None
    assert recorded_branch_point(tmp_path) is None


def test_a_branch_continues_steps_tokens_and_rows_of_the_named_checkpoint(tmp_path: Path) -> None:
    trunk = run_config(tmp_path / "trunk")
    target = saved(trunk, 10)
    saved(trunk, 20)

    point = find_branch_point(branch_config(tmp_path, target))

    assert point is not None
    assert (point.trunk_step, point.step, point.kept) == (10, 10, ALL_KEPT)
    assert (point.rows, point.tokens, point.order_rows) == (40, 40 * 64, 4)
    assert point.updates == 9
    assert point.sha256 == hashlib.sha256((target / META_NAME).read_bytes()).hexdigest()


def test_a_branch_of_a_run_continues_its_newest_checkpoint(tmp_path: Path) -> None:
    trunk = run_config(tmp_path / "trunk")
    for step in (10, 20):
        saved(trunk, step)

    point = find_branch_point(branch_config(tmp_path, trunk.run))

    assert point is not None
    assert point.trunk_step == 20


def test_what_is_not_kept_begins_at_zero(tmp_path: Path) -> None:
    saved(run_config(tmp_path / "trunk"), 10)

    point = find_branch_point(branch_config(tmp_path, tmp_path / "trunk", keep=["data"]))

    assert point is not None
    assert point.kept == ("weights", "data")
    assert (point.step, point.tokens, point.rows) == (0, 0, 40)


def test_a_branch_of_a_branch_counts_from_the_first_trunk(tmp_path: Path) -> None:
    saved(run_config(tmp_path / "trunk"), 10)
    wide = {"context_tokens": 64, "global_batch_rows": 16, "micro_batch_rows": 2}
    middle = branch_config(tmp_path, tmp_path / "trunk", batch=wide)
    saved(middle, 15, find_branch_point(middle))

    last = run_config(tmp_path / "last", branch_from=middle.run)
    point = find_branch_point(last)

    assert point is not None
    assert (point.step, point.rows, point.order_rows) == (15, 10 * 4 + 5 * 16, 4)
    assert point.tokens == point.rows * 64


def test_a_branch_that_has_begun_needs_no_trunk(tmp_path: Path) -> None:
    target = saved(run_config(tmp_path / "trunk"), 10)
    config = branch_config(tmp_path, target)
    begun = find_branch_point(config)
    saved(config, 10, begun)
    (target / META_NAME).unlink()

    assert find_branch_point(config) == begun
    assert find_branch_point(config.model_copy(update={"branch_from": None})) == begun
    assert recorded_branch_point(config.run) == begun


def test_the_branches_of_a_run_are_listed_by_number(tmp_path: Path) -> None:
    for name in ("1e10", "2e9", "other", "5e9"):
        (tmp_path / "branches" / name).mkdir(parents=True)
        (tmp_path / "branches" / name / "history.jsonl").touch()
    (tmp_path / "branches/empty").mkdir()

    assert [path.name for path in branches_of(tmp_path)] == ["2e9", "5e9", "1e10", "other"]


MODEL = {"num_layers": 1, "width": 64, "num_heads": 4}
REFUSED = [
    ({"model": MODEL}, ["model.width = 32", "model.width = 64", "change the config's model"]),
    (
        {"optimizer": {"learning_rate": 1e-3, "name": "muon"}},
        ["optimizer.name = adamw", "keep=[weights, schedule, data]"],
    ),
    (
        {"training": {"steps": 25, "seed": 1}},
        ["training.seed = 0", "keep=[weights, optimizer, schedule]"],
    ),
    (
        {"data": {"shards": "shards", "rows": "documents"}},
        ["data.rows = stream", "keep=[weights, optimizer, schedule]"],
    ),
    (
        {"data": {"shards": "shards", "window_frames": 4}},
        ["data.window_frames = 8", "keep=[weights, optimizer, schedule]"],
    ),
]


@pytest.mark.parametrize(("sections", "words"), REFUSED)
def test_what_does_not_fit_is_refused_with_the_keep_that_would(
    sections: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    saved(run_config(tmp_path / "trunk"), 10)

    with pytest.raises(RunMismatchError) as refused:
        find_branch_point(branch_config(tmp_path, tmp_path / "trunk", **sections))

    assert all(word in str(refused.value) for word in words), refused.value


@pytest.mark.parametrize(("sections", "words"), REFUSED[1:])
def test_the_keep_that_is_named_is_accepted(
    sections: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    saved(run_config(tmp_path / "trunk"), 10)
    keep = words[1].removeprefix("keep=[").removesuffix("]").split(", ")

    branch = branch_config(tmp_path, tmp_path / "trunk", keep=keep, **sections)

    assert find_branch_point(branch) is not None


def refusal(config: Config) -> MegabackError:
    with pytest.raises(MegabackError) as refused:
        find_branch_point(config)
    return refused.value


def test_a_path_that_does_not_exist_is_refused_with_the_folder_that_it_is_relative_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    error = refusal(branch_config(tmp_path, Path("runs/trunk")))

    assert isinstance(error, CheckpointMissingError)
    assert f"branch_from runs/trunk does not exist in {tmp_path}" in str(error)


def test_a_trunk_without_a_checkpoint_is_refused(tmp_path: Path) -> None:
    (tmp_path / "trunk").mkdir()
    error = refusal(branch_config(tmp_path, tmp_path / "trunk"))

    assert isinstance(error, CheckpointMissingError)
    assert "holds no complete checkpoint" in str(error)


@pytest.mark.parametrize("text", ["", "[]", '{"step": 1}', '{"step": -1, "config": {}}'])
def test_a_trunk_that_cannot_be_read_is_refused(text: str, tmp_path: Path) -> None:
    target = saved(run_config(tmp_path / "trunk"), 10)
    (target / META_NAME).write_text(text)

    assert isinstance(refusal(branch_config(tmp_path, target)), CheckpointCorruptError)


def test_rows_of_another_order_are_refused_unless_the_data_restart(tmp_path: Path) -> None:
    target = saved(run_config(tmp_path / "trunk"), 10)
    fields = json.loads((target / META_NAME).read_text())
    (target / META_NAME).write_text(json.dumps(fields | {"order_version": 999}))

    error = refusal(branch_config(tmp_path, target))

    assert "order_version = 999" in str(error)
    assert "keep=[weights, optimizer, schedule]" in str(error)
    assert find_branch_point(branch_config(tmp_path, target, keep=["schedule"])) is not None


def test_the_folder_of_a_run_that_was_no_branch_is_refused(tmp_path: Path) -> None:
    saved(run_config(tmp_path / "trunk"), 10)
    config = branch_config(tmp_path, tmp_path / "trunk")
    saved(config, 5)

    assert "did not begin as a branch" in str(refusal(config))


def test_another_keep_is_refused_once_the_branch_has_begun(tmp_path: Path) -> None:
    saved(run_config(tmp_path / "trunk"), 10)
    config = branch_config(tmp_path, tmp_path / "trunk")
    saved(config, 12, find_branch_point(config))

    error = refusal(branch_config(tmp_path, tmp_path / "trunk", keep=["weights"]))

    assert "began with keep = weights, optimizer, schedule, data" in str(error)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"branch_from": "a", "init_from": "b"}, "set init_from=null to continue"),
        ({"keep": ["weights"]}, "keep is for branches only"),
        ({"branch_from": "a", "keep": ["momentum"]}, "'weights', 'optimizer', 'schedule' or"),
    ],
)
def test_invalid_keys_of_a_branch_are_refused(
    fields: dict[str, Any], words: str, tmp_path: Path
) -> None:
    with pytest.raises(ValidationError, match=words):
        run_config(tmp_path, **fields)
