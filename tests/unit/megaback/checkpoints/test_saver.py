"""Saving of checkpoints in the background, leftovers of killed saves, and rotation."""

import hashlib
import json
import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event
from time import sleep

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor

from data_pipeline.common.atomic import partial_name
from data_pipeline.errors import StorageError
from megaback.checkpoints import saver as checkpoint_saver
from megaback.checkpoints.checkpoint import (
    CheckpointMeta,
    find_checkpoint,
    newest_checkpoint,
    read_meta,
    verify_files,
)
from megaback.checkpoints.safetensors_file import write_tensors
from megaback.checkpoints.saver import CheckpointSaver
from megaback.config_operation import CheckpointSection
from megaback.distributed.world import World
from megaback.faults.start_fence import Fence, begin_start
from megaback.run_folder import META_NAME, complete_checkpoints
from tests.helpers.batches import CHECKPOINT_TOKENIZER

Save = Callable[..., Path]
State = dict[str, Tensor]
FullDisk = Callable[[], AbstractContextManager[None]]
WEIGHTS = "weights-00000.safetensors"
OPTIMIZER = "optimizer-00000.safetensors"


@pytest.fixture
def make_saver(tmp_path: Path, world: World) -> Callable[..., CheckpointSaver]:
    """`make_saver(**options of CheckpointSection)`."""

    def make(**options: object) -> CheckpointSaver:
        section = CheckpointSection.model_validate(options)
        return CheckpointSaver(tmp_path, CHECKPOINT_TOKENIZER, section, world)

    return make


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Event]:
    """Event that blocks writing until it is set."""
    event = Event()

    def wait_and_write(
        path: Path, specs: dict[str, tuple[torch.dtype, list[int]]], of: Callable[[str], Tensor]
    ) -> tuple[int, str]:
        assert event.wait(60)
        return write_tensors(path, specs, of)

    monkeypatch.setattr(checkpoint_saver, "write_tensors", wait_and_write)
    yield event
    event.set()


def steps_of(run: Path) -> list[int]:
    return [int(path.name[5:]) for path in complete_checkpoints(run)]


def saved_in(target: Path) -> State:
    return {**load_file(target / WEIGHTS), **load_file(target / OPTIMIZER)}


def assert_equal(read: State, expected: State) -> None:
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[key], expected[key]) for key in expected)


def test_a_checkpoint_lists_every_file_with_its_size_and_hash(tmp_path: Path, save: Save) -> None:
    target = save(tmp_path, 100)

    files = read_meta(target).files
    assert files.keys() == {WEIGHTS, OPTIMIZER, "tokenizer.model"}
    assert {path.name for path in target.iterdir()} == {*files, META_NAME}
    for name, entry in files.items():
        data = (target / name).read_bytes()
        assert entry == (len(data), hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("background", [True, False])
def test_weights_and_optimizer_state_are_saved_in_separate_files(
    background: bool, tmp_path: Path, save: Save, state_at: Callable[[int], State]
) -> None:
    target = save(tmp_path, 100, background=background)

    assert load_file(target / WEIGHTS).keys() == {"weight:a:0"}
    assert_equal(saved_in(target), state_at(100))
    assert (target / "tokenizer.model").read_bytes() == CHECKPOINT_TOKENIZER


@pytest.mark.parametrize(
    "state", [{}, {"weight:a:0": torch.ones(3)}, {"exp_avg:a:7": torch.ones(3)}]
)
def test_a_rank_without_weights_or_without_moments_has_both_files(
    state: State,
    tmp_path: Path,
    make_saver: Callable[..., CheckpointSaver],
    meta_at: Callable[..., CheckpointMeta],
) -> None:
    saver = make_saver()
    saver.begin(state, meta_at(100))
    saver.finish()
    target = saver.take_completed()

    assert target is not None
    verify_files(target, read_meta(target))
    assert_equal(saved_in(target), state)


@pytest.mark.parametrize("val_loss", [1.5, None, math.inf])
def test_metadata_reads_back_equal(
    val_loss: float | None, tmp_path: Path, save: Save, meta_at: Callable[..., CheckpointMeta]
) -> None:
    read = read_meta(save(tmp_path, 100, val_loss))

    assert {**vars(read), "files": {}} == vars(meta_at(100, val_loss))


def test_latest_names_the_newest_checkpoint(tmp_path: Path, save: Save) -> None:
    for step in (100, 200):
        save(tmp_path, step)

    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000200\n"


def test_the_best_checkpoint_is_named_and_kept_until_another_is_best(
    tmp_path: Path,
    make_saver: Callable[..., CheckpointSaver],
    meta_at: Callable[..., CheckpointMeta],
    state_at: Callable[[int], State],
) -> None:
    saver = make_saver(keep_last=2)

    def save_all(*steps: int, best: int) -> None:
        for step in steps:
            saver.begin(state_at(step), meta_at(step), is_best=step == best)
        saver.finish()

    save_all(100, 200, 300, 400, best=100)
    assert steps_of(tmp_path) == [100, 300, 400]
    named, _ = find_checkpoint(tmp_path / "checkpoints" / "best")
    assert named.name == "step-00000100"
    save_all(500, 600, 700, best=500)
    assert steps_of(tmp_path) == [500, 600, 700]


def test_a_checkpoint_whose_writing_fails_is_not_complete(
    tmp_path: Path, save: Save, full_disk: FullDisk, capsys: pytest.CaptureFixture[str]
) -> None:
    save(tmp_path, 100)
    with full_disk(), pytest.raises(SystemExit) as stopped:
        save(tmp_path, 200)

    assert stopped.value.code == StorageError.exit_code
    assert steps_of(tmp_path) == [100]
    incomplete = tmp_path / "checkpoints" / "step-00000200"
    assert [path.name for path in incomplete.iterdir()] == [WEIGHTS]
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert f"cannot write the checkpoint {incomplete}: " in message
    assert OPTIMIZER in message


def test_the_advice_for_a_full_disk_is_given_once(
    tmp_path: Path, meta_at: Callable[..., CheckpointMeta], state_at: Callable[[int], State]
) -> None:
    fence = Fence(begin_start(tmp_path), tmp_path, lambda: tmp_path)
    partial = tmp_path / partial_name(WEIGHTS, fence.start_id)
    partial.symlink_to("/dev/full")
    writing = checkpoint_saver._Writing(tmp_path, meta_at(1), state_at(1), 0, fence, is_best=False)
    writing.run()
    message = str(writing.error)
    assert f"'{tmp_path / WEIGHTS}': No space left on device" in message
    assert message.count("free some space") == 1
    assert message.count("again") == 1
    assert "intact" in message


def test_leftovers_of_a_killed_save_are_replaced(tmp_path: Path, save: Save) -> None:
    leftover = tmp_path / "checkpoints" / "step-00000100"
    leftover.mkdir(parents=True)
    names = ("weights-00007.safetensors", f".{META_NAME}.0123456789ab.partial")
    leftovers = [leftover / name for name in names]
    for path in leftovers:
        path.write_bytes(b"half")
    (leftover / "notes.txt").write_bytes(b"mine")

    target = save(tmp_path, 100)

    assert not any(path.exists() for path in leftovers)
    assert (target / "notes.txt").read_bytes() == b"mine"


def test_a_save_does_not_follow_links(tmp_path: Path, save: Save) -> None:
    other = save(tmp_path / "other run", 100)
    mine = tmp_path / "mine"
    mine.write_bytes(b"mine")
    folder = tmp_path / "checkpoints"
    (folder / "step-00000200").mkdir(parents=True)
    for link in (WEIGHTS, OPTIMIZER, META_NAME, "tokenizer.model"):
        (folder / "step-00000200" / link).symlink_to(mine)
    (folder / "step-00000100").symlink_to(other)
    (folder / "latest").symlink_to(mine)
    before = {path: path.read_bytes() for path in other.iterdir()}
    (other / WEIGHTS).write_bytes(b"damaged: saved again")
    before[other / WEIGHTS] = b"damaged: saved again"

    for step in (100, 200):
        target = save(tmp_path, step)
        verify_files(target, read_meta(target))

    assert mine.read_bytes() == b"mine"
    assert {path: path.read_bytes() for path in other.iterdir()} == before


def test_saving_a_step_again_never_loses_its_checkpoint(
    tmp_path: Path, save: Save, world: World, full_disk: FullDisk
) -> None:
    """A signal just after a regular checkpoint requests the same one again."""
    save(tmp_path, 100)
    with full_disk(), suppress(SystemExit):
        save(tmp_path, 100)

    found = newest_checkpoint(tmp_path, world)
    assert found is not None
    assert found[1].step == 100


def test_a_step_whose_checkpoint_is_damaged_is_saved_again(tmp_path: Path, save: Save) -> None:
    (save(tmp_path, 100) / WEIGHTS).write_bytes(b"damage")

    target = save(tmp_path, 100)

    verify_files(target, read_meta(target))


def test_the_state_at_begin_is_saved(
    gate: Event,
    make_saver: Callable[..., CheckpointSaver],
    meta_at: Callable[..., CheckpointMeta],
    state_at: Callable[[int], State],
) -> None:
    """Training continues in place; the second save reuses the first one's host memory."""
    saver, state = make_saver(), state_at(0)
    for step in (100, 200):
        for tensor in state.values():
            tensor.fill_(step)
        before = {key: tensor.clone() for key, tensor in state.items()}
        gate.clear()
        saver.begin(state, meta_at(step))
        for tensor in state.values():
            tensor.add_(1)
        gate.set()
        saver.finish()
        target = saver.take_completed()

        assert target is not None
        assert_equal(saved_in(target), before)


def test_a_checkpoint_is_open_until_it_is_finished(
    tmp_path: Path,
    gate: Event,
    make_saver: Callable[..., CheckpointSaver],
    meta_at: Callable[..., CheckpointMeta],
    state_at: Callable[[int], State],
) -> None:
    saver = make_saver()
    assert (saver.is_open, saver.is_writing) == (False, False)
    saver.finish()
    assert saver.take_completed() is None

    saver.begin(state_at(100), meta_at(100))
    assert (saver.is_open, saver.is_writing) == (True, True)

    gate.set()
    while saver.is_writing:
        sleep(0.001)
    assert saver.is_open
    assert steps_of(tmp_path) == []

    saver.finish()
    assert saver.take_completed() == tmp_path / "checkpoints" / "step-00000100"
    assert saver.take_completed() is None
    assert (saver.is_open, saver.is_writing) == (False, False)
    assert steps_of(tmp_path) == [100]


def test_in_the_foreground_everything_is_written_when_begin_returns(
    tmp_path: Path,
    make_saver: Callable[..., CheckpointSaver],
    meta_at: Callable[..., CheckpointMeta],
    state_at: Callable[[int], State],
) -> None:
    saver = make_saver(background=False)
    saver.begin(state_at(100), meta_at(100))

    assert (saver.is_open, saver.is_writing) == (False, False)
    target = tmp_path / "checkpoints" / "step-00000100"
    verify_files(target, read_meta(target))


def test_beginning_a_checkpoint_completes_the_one_that_is_open(
    tmp_path: Path,
    make_saver: Callable[..., CheckpointSaver],
    meta_at: Callable[..., CheckpointMeta],
    state_at: Callable[[int], State],
) -> None:
    saver = make_saver()
    for step in (100, 200):
        saver.begin(state_at(step), meta_at(step))

    assert steps_of(tmp_path) == [100]
    saver.finish()
    assert_equal(saved_in(tmp_path / "checkpoints" / "step-00000100"), state_at(100))


@settings(max_examples=20)
@given(
    st.lists(st.sampled_from([None, 1.5, math.nan, math.inf]), min_size=1, max_size=7),
    st.integers(2, 3),
    st.none() | st.integers(100, 300),
)
@example([1.5, 1.5, 1.5, 1.5, 1.5], 2, None)
@example([1.5, 1.5, 1.5, 1.5, 1.5], 2, 200)
@example([1.5, math.nan, math.nan, math.nan], 2, None)
def test_the_last_the_periodic_and_the_last_finite_checkpoints_are_kept(
    save: Save, val_losses: list[float | None], keep_last: int, every: int | None
) -> None:
    losses = {100 * (1 + number): loss for number, loss in enumerate(val_losses)}
    with TemporaryDirectory() as run:
        for step, loss in losses.items():
            save(Path(run), step, loss, keep_last=keep_last, keep_every_steps=every)

        kept = set(list(losses)[-keep_last:])
        kept |= {step for step in losses if every is not None and step % every == 0}
        finite = [step for step, loss in losses.items() if loss is None or math.isfinite(loss)]
        assert steps_of(Path(run)) == sorted(kept.union(finite[-1:]))
        folders = {path.name for path in (Path(run) / "checkpoints").glob("step-*")}
        assert folders == {path.name for path in complete_checkpoints(Path(run))}


def test_a_checkpoint_is_made_incomplete_before_it_is_deleted(
    tmp_path: Path, save: Save, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A kill during deletion must not leave a complete checkpoint without its files."""
    for step in (100, 200):
        save(tmp_path, step)
    removed: list[Path] = []

    def remember(folder: Path, ignore_errors: bool = False) -> None:
        if folder.exists():
            removed.append(folder)
            assert not (folder / META_NAME).exists()

    with monkeypatch.context() as patch:
        patch.setattr("megaback.checkpoints.saver.remove_own_files", remember)
        save(tmp_path, 300, keep_last=2)

    assert [folder.name for folder in removed] == ["step-00000100"]


def test_leftovers_of_a_killed_rotation_are_removed_by_the_next_one(
    tmp_path: Path, save: Save
) -> None:
    for step in (100, 200, 300):
        save(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000100" / META_NAME).unlink()

    save(tmp_path, 400, keep_last=2)

    assert not (tmp_path / "checkpoints" / "step-00000100").exists()


def test_rotation_keeps_targets_of_links_and_other_files(tmp_path: Path, save: Save) -> None:
    others = [save(tmp_path / "other run", step) for step in (10, 20)]
    (others[1] / META_NAME).unlink()
    (tmp_path / "checkpoints").mkdir()
    for other in others:
        (tmp_path / "checkpoints" / other.name).symlink_to(other)
    before = {path: path.read_bytes() for other in others for path in other.iterdir()}
    (save(tmp_path, 100) / "notes.txt").write_bytes(b"mine")

    for step in (200, 300):
        save(tmp_path, step, keep_last=2)

    assert {path: path.read_bytes() for other in others for path in other.iterdir()} == before
    left = tmp_path / "checkpoints" / "step-00000100"
    assert {path.name: path.read_bytes() for path in left.iterdir()} == {"notes.txt": b"mine"}
    assert steps_of(tmp_path) == [10, 200, 300]


def test_rotation_keeps_folders_that_are_not_checkpoints(tmp_path: Path, save: Save) -> None:
    others = [tmp_path / "checkpoints" / name for name in ("mine", "step-1", "step-00000001.old")]
    for other in others:
        other.mkdir(parents=True)

    for step in (100, 200, 300):
        save(tmp_path, step, keep_last=2)

    assert all(other.is_dir() for other in others)


def test_a_checkpoint_with_damaged_metadata_does_not_count_as_finite(
    tmp_path: Path, save: Save
) -> None:
    for step in (100, 200):
        save(tmp_path, step)
    meta = tmp_path / "checkpoints" / "step-00000200" / META_NAME
    meta.write_text(json.dumps({"val_loss": 1.5}))

    for step in (300, 400):
        save(tmp_path, step, math.nan, keep_last=2)

    assert steps_of(tmp_path) == [100, 300, 400]


def test_a_checkpoint_written_in_the_foreground_is_returned_as_completed(
    tmp_path: Path,
    meta_at: Callable[..., CheckpointMeta],
    state_at: Callable[[int], State],
    world: World,
) -> None:
    saver = CheckpointSaver(tmp_path, b"t", CheckpointSection(background=False), world)
    saver.begin(state_at(100), meta_at(100))

    assert saver.take_completed() == tmp_path / "checkpoints" / "step-00000100"
