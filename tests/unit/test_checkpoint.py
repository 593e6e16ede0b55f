"""A checkpoint is whole or absent, and nothing is used before it is verified."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from data_pipeline.errors import (
    CheckpointCorruptError,
    CheckpointMissingError,
    RunMismatchError,
    StorageError,
)
from megaback import checkpoint
from megaback.checkpoint import (
    META_NAME,
    CheckpointMeta,
    complete_checkpoints,
    find_checkpoint,
    load_into_engine,
    newest_checkpoint,
    read_meta,
    save_checkpoint,
    verify_files,
)
from megaback.distributed import World

TOKENIZER = b"a tokenizer"


@pytest.fixture(scope="module")
def world() -> Iterator[World]:
    """One rank, with a real process group."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


class FakeWriter:
    """Writes a file as DeepSpeed's does, and can be told to fail."""

    def __init__(self, fails: bool) -> None:
        self.fails = fails

    def save(self, state: bytes, path: str) -> None:
        if self.fails and path.endswith("optimizer.pt"):
            raise OSError(28, "No space left on device")
        Path(path).write_bytes(state)


class FakeEngine:
    """Writes two files as DeepSpeed does; the writing of the second can be told to fail."""

    def __init__(self, fails: bool = False) -> None:
        self.checkpoint_engine = FakeWriter(fails)

    def save_checkpoint(self, folder: str, tag: str, save_latest: bool) -> None:
        assert not save_latest
        target = Path(folder) / tag
        target.mkdir(exist_ok=True)
        self.checkpoint_engine.save(tag.encode() * 1000, str(target / "model.pt"))
        self.checkpoint_engine.save(b"moments", str(target / "optimizer.pt"))

    def zero_optimization_stage(self) -> int:
        return 2


def meta_at(step: int) -> CheckpointMeta:
    return CheckpointMeta(
        step=step,
        world_size=1,
        zero_stage=2,
        precision="fp32",
        vocab_size=600,
        text_format={"direction": "backward", "unit": "token", "tokenizer_sha256": "ab" * 32},
        data_fingerprint="cd" * 32,
        config={"run": "run"},
        val_loss=1.5,
        versions={"torch": "2"},
        files={},
    )


def save(run: Path, step: int, world: World, keep_last: int = 10, fails: bool = False) -> Path:
    return save_checkpoint(FakeEngine(fails), run, meta_at(step), TOKENIZER, world, keep_last)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {"truncated": truncate, "flipped": flip, "missing": Path.unlink}


def test_a_checkpoint_lists_every_file_with_its_size_and_hash(tmp_path: Path, world: World) -> None:
    target = save(tmp_path, 100, world)

    files = read_meta(target).files
    assert files.keys() == {"model.pt", "optimizer.pt", "tokenizer.model"}
    for name, entry in files.items():
        data = (target / name).read_bytes()
        assert entry == (len(data), hashlib.sha256(data).hexdigest())


def test_meta_reads_back_as_it_was_given(tmp_path: Path, world: World) -> None:
    read = read_meta(save(tmp_path, 100, world))

    assert {**vars(read), "files": {}} == vars(meta_at(100))


def test_latest_names_the_newest_checkpoint(tmp_path: Path, world: World) -> None:
    for step in (100, 200):
        save(tmp_path, step, world)

    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000200\n"


def test_a_checkpoint_that_fails_half_way_is_not_complete(tmp_path: Path, world: World) -> None:
    save(tmp_path, 100, world)
    with pytest.raises(SystemExit, match=str(StorageError.exit_code)):
        save(tmp_path, 200, world, fails=True)

    assert [path.name for path in complete_checkpoints(tmp_path)] == ["step-00000100"]


def test_what_a_killed_save_left_behind_is_replaced(tmp_path: Path, world: World) -> None:
    leftover = tmp_path / "checkpoints" / "step-00000100"
    leftover.mkdir(parents=True)
    (leftover / "half.pt").write_bytes(b"half")

    target = save(tmp_path, 100, world)

    assert "half.pt" not in {path.name for path in target.iterdir()}


def test_saving_a_step_again_never_loses_what_was_saved(tmp_path: Path, world: World) -> None:
    """A signal just after a checkpoint that was due asks for the same one again."""
    save(tmp_path, 100, world)
    with suppress(SystemExit):
        save(tmp_path, 100, world, fails=True)

    assert newest_checkpoint(tmp_path, world)[1].step == 100


def test_an_intact_checkpoint_verifies(tmp_path: Path, world: World) -> None:
    target = save(tmp_path, 100, world)

    verify_files(target, read_meta(target))


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "tokenizer.model"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(damage: str, name: str, tmp_path: Path, world: World) -> None:
    target = save(tmp_path, 100, world)
    DAMAGE[damage](target / name)

    with pytest.raises(CheckpointCorruptError, match=f"{target} is damaged: {name} "):
        verify_files(target, read_meta(target))


@pytest.mark.parametrize("name", ["model.pt", "optimizer.pt", "tokenizer.model"])
@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_exactly_one_rank_verifies_a_file(
    parts: int, name: str, tmp_path: Path, world: World
) -> None:
    target = save(tmp_path, 100, world)
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
def test_a_meta_that_is_no_description_is_refused(
    content: str, tmp_path: Path, world: World
) -> None:
    target = save(tmp_path, 100, world)
    (target / META_NAME).write_text(content)

    with pytest.raises(CheckpointCorruptError, match=META_NAME):
        read_meta(target)


def change_field(target: Path, name: str, value: Any) -> None:
    fields = json.loads((target / META_NAME).read_text())
    (target / META_NAME).write_text(json.dumps({**fields, name: value}))


@pytest.mark.parametrize("field", ["direction", "unit", "tokenizer_sha256"])
def test_a_meta_without_a_part_of_its_text_format_is_refused(
    field: str, tmp_path: Path, world: World
) -> None:
    target = save(tmp_path, 100, world)
    text_format = {**meta_at(100).text_format}
    del text_format[field]
    change_field(target, "text_format", text_format)

    with pytest.raises(CheckpointCorruptError, match=META_NAME):
        read_meta(target)


@pytest.mark.parametrize(("field", "value"), [("files", None), ("files", {"a": 1}), ("step", "x")])
def test_a_meta_with_a_field_of_another_kind_is_refused(
    field: str, value: object, tmp_path: Path, world: World
) -> None:
    target = save(tmp_path, 100, world)
    change_field(target, field, value)

    with pytest.raises(CheckpointCorruptError):
        find_checkpoint(target)


def test_a_run_without_checkpoints_has_no_newest_one(tmp_path: Path, world: World) -> None:
    assert newest_checkpoint(tmp_path, world) is None


def test_an_incomplete_checkpoint_is_no_checkpoint(tmp_path: Path, world: World) -> None:
    (save(tmp_path, 100, world) / META_NAME).unlink()

    assert newest_checkpoint(tmp_path, world) is None


def test_the_newest_checkpoint_is_the_one_of_the_latest_step(tmp_path: Path, world: World) -> None:
    for step in (900, 1000, 20):
        save(tmp_path, step, world)

    target, meta = newest_checkpoint(tmp_path, world)

    assert (target.name, meta.step) == ("step-00001000", 1000)


@pytest.mark.parametrize("damage", DAMAGE)
def test_resuming_goes_back_to_the_newest_checkpoint_that_verifies(
    damage: str, tmp_path: Path, world: World
) -> None:
    for step in (100, 200, 300):
        target = save(tmp_path, step, world)
        if step > 100:
            DAMAGE[damage](target / "model.pt")

    target, meta = newest_checkpoint(tmp_path, world)

    assert (target.name, meta.step) == ("step-00000100", 100)


def test_going_back_is_said_with_the_file_that_is_damaged(
    tmp_path: Path, world: World, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 100, world)
    flip(save(tmp_path, 200, world) / "model.pt")

    newest_checkpoint(tmp_path, world)

    said = capsys.readouterr().out
    assert "step-00000200 is damaged: model.pt" in said
    assert "going back to step-00000100" in said


def test_when_no_complete_checkpoint_verifies_the_run_stops(tmp_path: Path, world: World) -> None:
    for step in (100, 200):
        truncate(save(tmp_path, step, world) / "optimizer.pt")

    with pytest.raises(CheckpointCorruptError, match=r"no other checkpoint of .* verifies"):
        newest_checkpoint(tmp_path, world)


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step-00000200"])
def test_a_run_its_checkpoints_and_a_step_all_mean_the_newest_checkpoint(
    inside: str, tmp_path: Path, world: World
) -> None:
    for step in (100, 200):
        save(tmp_path, step, world)

    assert find_checkpoint(tmp_path / inside)[1].step == 200


@pytest.mark.parametrize("inside", ["", "checkpoints", "checkpoints/step-00000100", "nowhere"])
def test_without_a_complete_checkpoint_there_is_nothing_to_find(
    inside: str, tmp_path: Path, world: World
) -> None:
    (save(tmp_path, 100, world) / META_NAME).unlink()

    with pytest.raises(CheckpointMissingError, match=str(tmp_path / inside)):
        find_checkpoint(tmp_path / inside)


def test_a_damaged_checkpoint_is_not_found(tmp_path: Path, world: World) -> None:
    flip(save(tmp_path, 100, world) / "model.pt")

    with pytest.raises(CheckpointCorruptError, match=r"model\.pt"):
        find_checkpoint(tmp_path)


@pytest.mark.parametrize("keep_last", [2, 3])
def test_only_the_last_few_checkpoints_are_kept(
    keep_last: int, tmp_path: Path, world: World
) -> None:
    for step in range(100, 600, 100):
        save(tmp_path, step, world, keep_last)

    folders = sorted((tmp_path / "checkpoints").glob("step-*"))
    assert [int(path.name[5:]) for path in folders] == [100, 200, 300, 400, 500][-keep_last:]


def test_a_checkpoint_that_is_let_go_is_first_made_incomplete(
    tmp_path: Path, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill in the middle of removing must not leave a complete checkpoint without its files."""
    for step in (100, 200):
        save(tmp_path, step, world)
    removed: list[Path] = []

    def remember(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            removed.append(folder)
            assert not (folder / META_NAME).exists()

    monkeypatch.setattr(checkpoint.shutil, "rmtree", remember)

    save(tmp_path, 300, world, keep_last=2)

    assert [folder.name for folder in removed] == ["step-00000100"]


def test_what_a_killed_rotation_left_behind_is_removed_by_the_next_one(
    tmp_path: Path, world: World
) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step, world)
    (tmp_path / "checkpoints" / "step-00000100" / META_NAME).unlink()

    save(tmp_path, 400, world, keep_last=2)

    assert not (tmp_path / "checkpoints" / "step-00000100").exists()


def test_a_meta_whose_step_is_not_its_folders_is_refused(tmp_path: Path, world: World) -> None:
    target = save(tmp_path, 100, world)
    change_field(target, "step", 101)

    with pytest.raises(CheckpointCorruptError):
        read_meta(target)


def test_a_checkpoint_of_another_number_of_ranks_or_stage_is_not_loaded(
    tmp_path: Path, world: World
) -> None:
    target = save(tmp_path, 100, world)
    change_field(target, "world_size", 4)

    with pytest.raises(RunMismatchError, match="saved by 4 ranks at ZeRO stage 2, and this run"):
        load_into_engine(FakeEngine(), target, read_meta(target), world)
