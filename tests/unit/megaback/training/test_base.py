"""Runs that begin from copies of checkpoints: fetched once, verified, and without secrets."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import pytest
from safetensors.torch import load_file, save_file

from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError, RunMismatchError
from megaback.branches import recorded_branch_point
from megaback.checkpoints.checkpoint import find_checkpoint
from megaback.checkpoints.copies import CheckpointCopies
from megaback.checkpoints.fetching import fetch_base
from megaback.config import Config
from megaback.copy_location import find_base_copy
from megaback.distributed.world import CollectiveExit, World
from megaback.faults.exit_record import read_history
from megaback.faults.step_guard import read_excluded_steps
from megaback.run_folder import BASE_FOLDER, complete_checkpoints
from megaback.tracking.lineage import lineage
from megaback.weights.base_shape import with_base_shape
from tests.helpers.training import train
from tools.convert import convert

Configs = Callable[..., Config]
PLACE = "memory://bucket/runs"
WEIGHTS = "weights-00000.safetensors"


@pytest.fixture
def trunk(config_of: Configs, training_world: World) -> Iterator[Config]:
    """A run of four steps whose checkpoints, of steps 2 and 4, are only in a remote location."""
    config = config_of("trunk")
    train(config, training_world)
    files = fsspec.filesystem("memory")
    for checkpoint in complete_checkpoints(config.run):
        files.put(str(checkpoint), f"/bucket/runs/trunk/{checkpoint.name}", recursive=True)
    shutil.rmtree(config.run)
    yield config
    files.rm("/bucket", recursive=True)


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the checkpoints of which files were fetched."""
    names: list[str] = []
    get = CheckpointCopies.get

    def counted(copies: CheckpointCopies, folder: str, *arguments: Any) -> None:
        names.append(folder)
        get(copies, folder, *arguments)

    monkeypatch.setattr(CheckpointCopies, "get", counted)
    return names


def refusal(config: Config, world: World) -> Exception:
    with pytest.raises(CollectiveExit) as ending:
        train(config, world)
    assert ending.value.error is not None
    return ending.value.error


def test_a_branch_of_a_copy_is_the_branch_of_its_original(
    trunk: Config, config_of: Configs, training_world: World, fetched: list[str]
) -> None:
    config = config_of(branch_from=f"{PLACE}/trunk/step-00000002")
    train(config, training_world)

    last = CheckpointCopies(f"{PLACE}/trunk").meta("step-00000004")
    assert find_checkpoint(config.run)[1].files == last.files
    assert fetched == ["step-00000002"]
    assert not (config.run / BASE_FOLDER).exists()
    point = recorded_branch_point(config.run)
    assert point is not None
    assert (point.checkpoint, point.step) == (f"{PLACE}/trunk/step-00000002", 2)
    assert lineage(config, 0)["trunk"] == point.identity()


def test_copies_in_a_folder_are_read_where_they_are(
    trunk: Config, config_of: Configs, training_world: World, fetched: list[str], tmp_path: Path
) -> None:
    fsspec.filesystem("memory").get("/bucket/runs/trunk", str(tmp_path / "copies"), recursive=True)
    (tmp_path / "copies/skipped_steps.json").write_text("[[5, 5]]")
    config = config_of(branch_from=f"file://{tmp_path}/copies", training={"steps": 6})

    train(config, training_world)

    assert config.branch_from == tmp_path / "copies"
    assert fetched == []
    assert read_excluded_steps(config.run) == [(5, 5)]


def test_a_copy_that_a_killed_start_has_fetched_is_not_fetched_again(
    trunk: Config, config_of: Configs, training_world: World, fetched: list[str]
) -> None:
    config = config_of(branch_from=f"{PLACE}/trunk", training={"steps": 5, "precision": "fp32"})
    found = find_base_copy(f"{PLACE}/trunk")
    assert found is not None
    fetch_base(config.run / BASE_FOLDER, found[0], training_world)

    train(config, training_world)

    assert fetched == ["step-00000004"]
    assert not (config.run / BASE_FOLDER).exists()


def test_a_damaged_copy_is_refused_and_not_left_behind(
    trunk: Config, config_of: Configs, training_world: World
) -> None:
    path = f"/bucket/runs/trunk/step-00000004/{WEIGHTS}"
    data = bytearray(fsspec.filesystem("memory").cat_file(path))
    data[-1] ^= 1
    fsspec.filesystem("memory").pipe_file(path, bytes(data))
    config = config_of(branch_from=f"{PLACE}/trunk", training={"steps": 5})

    error = refusal(config, training_world)

    assert isinstance(error, CheckpointCorruptError)
    assert f"{PLACE}/trunk/step-00000004 does not verify" in str(error)
    assert [path for path in (config.run / BASE_FOLDER).rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("key", ["branch_from", "init_from"])
def test_a_location_without_copies_is_refused_without_its_password(
    key: str, config_of: Configs, training_world: World
) -> None:
    config = config_of(**{key: "memory://me:hunter2000@bucket/runs/other"})

    error = refusal(config, training_world)

    assert isinstance(error, CheckpointMissingError)
    assert f"{key} memory://bucket/runs/other" in str(error)
    assert "hunter2000" not in str(error)
    assert "hunter2000" not in config.to_yaml()


def test_initial_weights_are_fetched_from_copies(
    trunk: Config, config_of: Configs, training_world: World
) -> None:
    config = config_of(init_from=f"{PLACE}/trunk")
    train(config, training_world)
    branch = config_of("branch", branch_from=f"{PLACE}/trunk", keep=["weights"])
    train(branch, training_world)

    run = config.run
    assert find_checkpoint(run)[1].files == find_checkpoint(branch.run)[1].files
    assert not (run / BASE_FOLDER).exists()
    base = lineage(config, 0)["base"]
    assert (base["path"], base["step"]) == (f"{PLACE}/trunk/step-00000004", 4)
    assert base == next(line["base"] for line in read_history(run) if "base" in line)


def test_weights_of_another_shape_are_refused_by_their_address(
    trunk: Config, config_of: Configs, training_world: World
) -> None:
    model = json.loads(trunk.model.model_dump_json()) | {"num_layers": 3}

    error = refusal(config_of(init_from=f"{PLACE}/trunk", model=model), training_world)

    assert isinstance(error, RunMismatchError)
    assert f"init_from {PLACE}/trunk/step-00000004 has another shape" in str(error)


def test_a_config_takes_the_shape_of_its_model_from_copies(trunk: Config) -> None:
    fields = with_base_shape({"init_from": f"{PLACE}/trunk"})

    assert fields["model"] == trunk.model.architecture()


def test_weights_of_another_program_are_recorded_by_their_hash(
    config_of: Configs, training_world: World, tmp_path: Path
) -> None:
    first = config_of("first")
    train(first, training_world)
    plain = tmp_path / "plain"
    convert(first.run, plain, "hf", "float32")
    (plain / "megaback.spm").rename(plain / "tokenizer.model")
    fields = json.loads((plain / "config.json").read_text())
    del fields["megaback"]
    (plain / "config.json").write_text(json.dumps(fields))
    (plain / "SHA256SUMS").unlink()
    weights = plain / "model.safetensors"
    save_file(load_file(weights), weights)  # as another program writes it
    config = config_of(init_from=plain)

    train(config, training_world)

    listed = f"{hashlib.sha256(weights.read_bytes()).hexdigest()}  {weights.name}\n"
    expected = hashlib.sha256(listed.encode()).hexdigest()
    assert lineage(config, 0)["base"]["sha256"] == expected
    imported = find_checkpoint(config.run)[1].imported
    assert imported is not None
    assert (imported.base.path, imported.base.sha256) == (str(plain), expected)
