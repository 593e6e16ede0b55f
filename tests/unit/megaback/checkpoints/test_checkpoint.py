"""Verification of checkpoints and their metadata, and selection of the newest one."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data_pipeline.errors import CheckpointCorruptError, CheckpointMissingError
from megaback.checkpoints.checkpoint import (
    CheckpointMeta,
    find_checkpoint,
    newest_checkpoint,
    read_meta,
    verify_files,
)
from megaback.distributed.world import World
from megaback.run_folder import GGUF_NAME, META_NAME

Save = Callable[..., Path]
WEIGHTS = "weights-00000.safetensors"
OPTIMIZER = "optimizer-00000.safetensors"
FILES = [WEIGHTS, OPTIMIZER, "tokenizer.model"]


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE: dict[str, Callable[[Path], object]] = {
    "truncated": truncate,
    "flipped": flip,
    "missing": Path.unlink,
}


def newest(run: Path, world: World) -> tuple[Path, CheckpointMeta]:
    found = newest_checkpoint(run, world)
    assert found is not None
    return found


def test_an_intact_checkpoint_verifies(tmp_path: Path, save: Save) -> None:
    target = save(tmp_path, 100)

    verify_files(target, read_meta(target))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_reported(damage: str, name: str, tmp_path: Path, save: Save) -> None:
    target = save(tmp_path, 100)
    DAMAGE[damage](target / name)

    with pytest.raises(CheckpointCorruptError, match=f"{target} is damaged: {name} "):
        verify_files(target, read_meta(target))


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_exactly_one_rank_verifies_a_file(
    parts: int, name: str, tmp_path: Path, save: Save
) -> None:
    target = save(tmp_path, 100)
    flip(target / name)
    refused = []
    for part in range(parts):
        try:
            verify_files(target, read_meta(target), part, parts)
        except CheckpointCorruptError:
            refused.append(part)

    assert len(refused) == 1


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"format": "megaback-checkpoint", "version": 99}', "null", "\0"],
)
def test_invalid_metadata_is_refused(content: str, tmp_path: Path, save: Save) -> None:
    target = save(tmp_path, 100)
    (target / META_NAME).write_text(content)

    with pytest.raises(CheckpointCorruptError, match=META_NAME):
        read_meta(target)


def change_field(target: Path, name: str, value: Any) -> None:
    fields = json.loads((target / META_NAME).read_text())
    (target / META_NAME).write_text(json.dumps({**fields, name: value}))


@pytest.mark.parametrize("field", ["direction", "unit", "tokenizer_sha256"])
def test_metadata_with_an_incomplete_text_format_is_refused(
    field: str, tmp_path: Path, save: Save
) -> None:
    target = save(tmp_path, 100)
    text_format = {**read_meta(target).text_format}
    del text_format[field]
    change_field(target, "text_format", text_format)

    with pytest.raises(CheckpointCorruptError, match=META_NAME):
        read_meta(target)


@pytest.mark.parametrize(("field", "value"), [("files", None), ("files", {"a": 1}), ("step", "x")])
def test_metadata_with_a_field_of_another_type_is_refused(
    field: str, value: object, tmp_path: Path, save: Save
) -> None:
    target = save(tmp_path, 100)
    change_field(target, field, value)

    with pytest.raises(CheckpointCorruptError):
        find_checkpoint(target)


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path: Path, world: World) -> None:
    assert newest_checkpoint(tmp_path, world) is None


def test_an_incomplete_checkpoint_is_ignored(tmp_path: Path, save: Save, world: World) -> None:
    (save(tmp_path, 100) / META_NAME).unlink()

    assert newest_checkpoint(tmp_path, world) is None


def test_the_newest_checkpoint_is_that_of_the_last_step(
    tmp_path: Path, save: Save, world: World
) -> None:
    for step in (900, 1000, 20):
        save(tmp_path, step)

    target, meta = newest(tmp_path, world)

    assert (target.name, meta.step) == ("step-00001000", 1000)


@pytest.mark.parametrize("damage", DAMAGE)
def test_resuming_goes_back_to_the_newest_checkpoint_that_verifies(
    damage: str, tmp_path: Path, save: Save, world: World
) -> None:
    for step in (100, 200, 300):
        target = save(tmp_path, step)
        if step > 100:
            DAMAGE[damage](target / WEIGHTS)

    target, meta = newest(tmp_path, world)

    assert (target.name, meta.step) == ("step-00000100", 100)


def test_going_back_is_logged_with_the_damaged_file(
    tmp_path: Path, save: Save, world: World, caplog: pytest.LogCaptureFixture
) -> None:
    save(tmp_path, 100)
    flip(save(tmp_path, 200) / WEIGHTS)

    newest_checkpoint(tmp_path, world)

    (message,) = caplog.messages
    assert f"step-00000200 is damaged: {WEIGHTS}" in message
    assert "going back to step-00000100" in message


def test_when_no_complete_checkpoint_verifies_the_run_stops(
    tmp_path: Path, save: Save, world: World
) -> None:
    for step in (100, 200):
        truncate(save(tmp_path, step) / OPTIMIZER)

    with pytest.raises(CheckpointCorruptError, match=r"no other checkpoint of .* verifies"):
        newest_checkpoint(tmp_path, world)


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step-00000200"])
def test_a_run_its_checkpoints_and_a_step_resolve_to_the_newest_checkpoint(
    inside: str, tmp_path: Path, save: Save
) -> None:
    for step in (100, 200):
        save(tmp_path, step)

    assert find_checkpoint(tmp_path / inside)[1].step == 200


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step-00000100", "nowhere"])
def test_a_path_without_a_complete_checkpoint_is_an_error(
    inside: str, tmp_path: Path, save: Save
) -> None:
    (save(tmp_path, 100) / META_NAME).unlink()

    with pytest.raises(CheckpointMissingError, match=str(tmp_path / inside)):
        find_checkpoint(tmp_path / inside)


def test_a_damaged_checkpoint_is_an_error(tmp_path: Path, save: Save) -> None:
    flip(save(tmp_path, 100) / WEIGHTS)

    with pytest.raises(CheckpointCorruptError, match=WEIGHTS):
        find_checkpoint(tmp_path)


def test_metadata_whose_step_differs_from_the_folder_is_refused(tmp_path: Path, save: Save) -> None:
    target = save(tmp_path, 100)
    change_field(target, "step", 101)

    with pytest.raises(CheckpointCorruptError):
        read_meta(target)


def test_a_gguf_export_is_named_as_such(tmp_path: Path) -> None:
    (tmp_path / GGUF_NAME).touch()

    for path in (tmp_path, tmp_path / GGUF_NAME):
        with pytest.raises(CheckpointMissingError, match=r"is a GGUF export.*--to full"):
            find_checkpoint(path)
