"""Copies of checkpoints in a second location: copying, fetching, rotation, rollback and errors."""

import math
import shutil
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from time import sleep

import fsspec
import pytest

from data_pipeline.errors import CheckpointCorruptError, OutputExistsError, SourceMissingError
from megaback.checkpoints.checkpoint import (
    find_checkpoint,
    newest_checkpoint,
    read_meta,
    verify_files,
)
from megaback.checkpoints.fetching import fetch_newest
from megaback.checkpoints.remote_copy import CheckpointCopier, CopyTarget
from megaback.config_operation import CheckpointSection
from megaback.distributed.world import World
from megaback.faults.step_guard import read_excluded_steps, write_skipped_steps
from megaback.run_folder import META_NAME, complete_checkpoints

Save = Callable[..., Path]
Copy = Callable[..., list[str]]
WEIGHTS = "weights-00000.safetensors"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "my run"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Value of copy_to."""
    return tmp_path / "second"


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of an in-memory file system."""
    yield "memory://bucket/runs"
    file_system = fsspec.filesystem("memory")
    if file_system.exists("/bucket"):
        file_system.rm("/bucket", recursive=True)


@pytest.fixture
def copy(save: Save, world: World) -> Copy:
    """`copy(run, copy_to, *steps, **options)` saves and copies; it returns logged messages."""

    def copy(run: Path, copy_to: object, *steps: int, **options: object) -> list[str]:
        logged: list[str] = []
        section = CheckpointSection.model_validate({"copy_to": str(copy_to), **options})
        copier = CheckpointCopier(run, section, world)
        for step in steps:
            copier.begin(save(run, step))
            copier.finish(logged.append)
        return logged

    return copy


def test_a_location_with_other_files_is_refused(run: Path, place: Path, copy: Copy) -> None:
    copy(run, place, 10)
    CopyTarget(str(place), run).require_ours()
    CopyTarget(str(place), run.with_name("a new one")).require_ours()
    (place / run.name / "notes.txt").touch()

    with pytest.raises(OutputExistsError, match=r"notes\.txt"):
        CopyTarget(str(place), run).require_ours()


def wait_for(copier: CheckpointCopier) -> None:
    while copier.is_copying:
        sleep(0.001)


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def fetched(run: Path, place: CopyTarget, world: World) -> Path | None:
    """The checkpoint that is fetched, if there is a copy."""
    found = fetch_newest(run, place, world)
    assert found is None or found[1] == read_meta(found[0])
    return found and found[0]


def names(steps: list[int]) -> list[str]:
    return [f"step-{step:08d}" for step in steps]


def test_a_copy_equals_the_checkpoint(run: Path, place: Path, copy: Copy) -> None:
    assert copy(run, place, 100) == []

    original = run / "checkpoints" / "step-00000100"
    copied = place / run.name / "step-00000100"
    assert {path.name: path.read_bytes() for path in copied.iterdir()} == {
        path.name: path.read_bytes() for path in original.iterdir()
    }
    assert find_checkpoint(copied)[1].step == 100


def test_metadata_is_copied_last(run: Path, place: Path, save: Save, world: World) -> None:
    section = CheckpointSection(copy_to=str(place))
    copier, second = CheckpointCopier(run, section, world), CopyTarget(str(place), run)
    copier.begin(save(run, 100))
    wait_for(copier)

    assert (copier.is_open, copier.is_copying) == (True, False)
    copied = {path.name for path in (place / run.name / "step-00000100").iterdir()}
    assert copied == read_meta(run / "checkpoints" / "step-00000100").files.keys()
    assert second.complete() == []

    copier.finish(pytest.fail)
    assert (copier.is_open, copier.is_copying) == (False, False)
    assert second.complete() == ["step-00000100"]


def test_a_checkpoint_saved_during_a_copy_is_not_copied(
    run: Path, place: Path, save: Save, world: World
) -> None:
    copier = CheckpointCopier(run, CheckpointSection(copy_to=str(place)), world)
    for step in (100, 200):
        copier.begin(save(run, step))
    copier.finish(pytest.fail)

    assert CopyTarget(str(place), run).complete() == ["step-00000100"]


@pytest.mark.parametrize("kind", ["path", "memory"])
def test_a_run_fetched_after_a_rollback_resumes_from_the_checkpoint_of_the_rollback(
    kind: str, run: Path, place: Path, memory: str, copy: Copy, world: World
) -> None:
    copy_to = str(place) if kind == "path" else memory
    copy(run, copy_to, 100, 200, 300, keep_last=5)
    second = CopyTarget(copy_to, run)

    second.roll_back(100, b"[[101, 350]]\n", "rolled-back-from-00000350")
    second.require_ours()
    shutil.rmtree(run)

    assert second.complete() == names([100])
    target = fetched(run, second, world)
    assert target is not None
    assert find_checkpoint(target)[1].step == 100
    assert read_excluded_steps(run) == [(101, 350)]


def test_copies_moved_by_a_rollback_stay_whole_and_do_not_count_in_rotation(
    run: Path, place: Path, copy: Copy
) -> None:
    copy(run, place, 100, 200, 300, keep_last=2)
    second = CopyTarget(str(place), run)
    second.roll_back(200, b"[[201, 300]]\n", "aside")
    second.roll_back(200, b"[[201, 300]]\n", "aside")
    copy(run, place, 240, 280, keep_last=2)

    assert second.complete() == names([240, 280])
    aside = place / run.name / "aside"
    assert [path.name for path in aside.iterdir()] == names([300])
    verify_files(aside / "step-00000300", read_meta(aside / "step-00000300"))


def test_skipped_steps_of_the_run_and_of_its_copies_are_merged(
    run: Path, place: Path, copy: Copy, world: World
) -> None:
    copy(run, place, 100)
    second = CopyTarget(str(place), run)
    second.roll_back(100, b"[[101, 150]]\n", "aside")
    shutil.rmtree(run / "checkpoints")
    write_skipped_steps(run, b"[[7, 9]]\n")

    fetched(run, second, world)

    assert read_excluded_steps(run) == [(7, 9), (101, 150)]


def test_without_a_second_location_or_a_checkpoint_nothing_is_copied(
    run: Path, place: Path, save: Save, world: World
) -> None:
    nowhere = CheckpointCopier(run, CheckpointSection(), world)
    nowhere.begin(save(run, 100))
    somewhere = CheckpointCopier(run, CheckpointSection(copy_to=str(place)), world)
    somewhere.begin(None)

    for copier in (nowhere, somewhere):
        assert (copier.is_open, copier.is_copying) == (False, False)
        copier.finish(pytest.fail)
    assert not place.exists()


def test_the_newest_copy_is_fetched_into_a_run_without_checkpoints(
    run: Path, place: Path, copy: Copy, world: World
) -> None:
    copy(run, place, 100, 200)
    shutil.rmtree(run)

    target = fetched(run, CopyTarget(str(place), run), world)

    assert target == run / "checkpoints" / "step-00000200"
    verify_files(target, read_meta(target))
    assert newest_checkpoint(run, world) == (target, read_meta(target))
    assert [path.name for path in target.parent.iterdir()] == ["step-00000200"]


def test_a_copy_at_a_url_is_fetched(run: Path, memory: str, copy: Copy, world: World) -> None:
    assert copy(run, memory, 100, 200, 300, keep_last=2) == []
    shutil.rmtree(run)
    place = CopyTarget(memory, run)
    assert (place.complete(), place.name) == (names([200, 300]), f"{memory}/{run.name}")

    target = fetched(run, place, world)

    assert target == run / "checkpoints" / "step-00000300"
    assert newest_checkpoint(run, world) == (target, read_meta(target))


def test_without_a_copy_nothing_is_fetched(
    run: Path, place: Path, memory: str, world: World
) -> None:
    assert fetched(run, CopyTarget(str(place), run), world) is None
    assert fetched(run, CopyTarget(memory, run), world) is None
    assert not run.exists()


@pytest.mark.parametrize("damage", [flip, Path.unlink])
@pytest.mark.parametrize("name", [WEIGHTS, "tokenizer.model"])
def test_the_newest_intact_copy_is_fetched(
    name: str, damage: Callable[[Path], object], run: Path, place: Path, copy: Copy, world: World
) -> None:
    copy(run, place, 100, 200, 300)
    for step in ("200", "300"):
        damage(place / run.name / f"step-00000{step}" / name)
    shutil.rmtree(run)

    target = fetched(run, CopyTarget(str(place), run), world)

    assert target is not None
    assert find_checkpoint(run) == (target, read_meta(target))
    assert [path.name for path in target.parent.iterdir()] == ["step-00000100"]


def test_a_copy_without_metadata_is_ignored(
    run: Path, place: Path, copy: Copy, world: World
) -> None:
    copy(run, place, 100, 200)
    (place / run.name / "step-00000200" / META_NAME).unlink()
    shutil.rmtree(run)

    target = fetched(run, CopyTarget(str(place), run), world)

    assert target == run / "checkpoints" / "step-00000100"


def test_an_error_is_raised_if_every_copy_is_damaged(
    run: Path, place: Path, copy: Copy, world: World
) -> None:
    copy(run, place, 100, 200)
    for copied in (place / run.name).iterdir():
        flip(copied / WEIGHTS)
    shutil.rmtree(run)

    with pytest.raises(CheckpointCorruptError, match=f"no copy in .* verifies: .*{WEIGHTS}"):
        fetched(run, CopyTarget(str(place), run), world)

    assert list((run / "checkpoints").iterdir()) == []


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({"keep_last": 2}, [400, 500]),
        ({"keep_last": 3}, [300, 400, 500]),
        ({"keep_last": 2, "keep_every_steps": 200}, [200, 400, 500]),
    ],
)
def test_copies_are_rotated_as_checkpoints_are(
    options: dict[str, int], kept: list[int], run: Path, place: Path, copy: Copy
) -> None:
    copy(run, place, 100, 200, 300, 400, 500, **options)

    assert CopyTarget(str(place), run).complete() == names(kept)
    assert sorted(path.name for path in (place / run.name).iterdir()) == names(kept)


def test_an_incomplete_copy_is_deleted_by_the_next_one(run: Path, place: Path, copy: Copy) -> None:
    copy(run, place, 100)
    (place / run.name / "step-00000100" / META_NAME).unlink()
    (place / run.name / "mine").mkdir()

    copy(run, place, 200)

    assert sorted(path.name for path in (place / run.name).iterdir()) == ["mine", *names([200])]


def test_links_and_other_files_are_kept(tmp_path: Path, run: Path, copy: Copy) -> None:
    place, other = tmp_path / "second", tmp_path / "other" / "step-00000001"
    copy(run, place, 100)
    (place / run.name / "step-00000100" / "notes.txt").write_bytes(b"mine")
    other.mkdir(parents=True)
    (other / META_NAME).write_bytes(b"mine")
    (place / run.name / other.name).symlink_to(other)

    copy(run, place, 200, 300, keep_last=2)

    assert (other / META_NAME).read_bytes() == b"mine"
    left = place / run.name / "step-00000100"
    assert [path.name for path in left.iterdir()] == ["notes.txt"]


def test_runs_of_different_names_have_separate_copies(
    tmp_path: Path, place: Path, copy: Copy, world: World
) -> None:
    one, other = tmp_path / "one", tmp_path / "other"
    copy(one, place, 100, 200)
    copy(other, place, 300, 400, 500, keep_last=2)

    for run, steps in ((one, [100, 200]), (other, [400, 500])):
        shutil.rmtree(run)
        second = CopyTarget(str(place), run)
        assert second.complete() == names(steps)
        target = fetched(run, second, world)
        assert target is not None
        assert target.name == names(steps)[-1]


def test_an_unwritable_location_is_reported_and_retried(run: Path, place: Path, copy: Copy) -> None:
    place.write_text("a file in the way")

    messages = copy(run, place, 100, 200)

    assert len(messages) == 2
    expected = f"step-00000200 was not copied to {CopyTarget(str(place), run).name}: "
    assert expected in messages[1]
    assert "training continues" in messages[1]
    assert "\n" not in messages[1]
    assert len(complete_checkpoints(run)) == 2
    place.unlink()
    assert copy(run, place, 300) == []


def test_a_full_second_location_is_reported_and_its_copies_are_kept(
    run: Path,
    place: Path,
    save: Save,
    copy: Copy,
    world: World,
    full_disk: Callable[[], AbstractContextManager[None]],
) -> None:
    copy(run, place, 100)
    copier = CheckpointCopier(run, CheckpointSection(copy_to=str(place)), world)
    target, second = save(run, 200), CopyTarget(str(place), run)
    logged: list[str] = []
    with full_disk():
        copier.begin(target)
        copier.finish(logged.append)

    assert len(logged) == 1
    assert "step-00000200 was not copied" in logged[0]
    assert second.complete() == ["step-00000100"]

    copier.begin(target)
    copier.finish(pytest.fail)
    assert second.complete() == ["step-00000100", "step-00000200"]


def test_an_unknown_file_system_is_refused(run: Path, world: World) -> None:
    section = CheckpointSection(copy_to="nonsense://bucket/runs")

    with pytest.raises(SourceMissingError, match="nonsense"):
        CheckpointCopier(run, section, world)


def test_a_non_finite_loss_is_copied(run: Path, place: Path, save: Save, world: World) -> None:
    copier = CheckpointCopier(run, CheckpointSection(copy_to=str(place)), world)
    copier.begin(save(run, 100, math.nan))
    copier.finish(pytest.fail)

    assert not read_meta(place / run.name / "step-00000100").is_finite


def test_a_copy_is_incomplete_while_it_is_written_again(
    run: Path, place: Path, copy: Copy, save: Save, world: World
) -> None:
    copy(run, place, 100)
    shutil.rmtree(run)
    copier = CheckpointCopier(run, CheckpointSection(copy_to=str(place)), world)

    copier.begin(save(run, 100))
    assert CopyTarget(str(place), run).complete() == []
    copier.finish(print)

    assert CopyTarget(str(place), run).complete() == ["step-00000100"]


def test_leftovers_of_a_killed_fetch_are_replaced(
    run: Path, place: Path, copy: Copy, world: World
) -> None:
    copy(run, place, 100)
    shutil.rmtree(run)
    (run / "checkpoints" / ".fetched.partial" / "half").mkdir(parents=True)

    fetched(run, CopyTarget(str(place), run), world)

    assert [path.name for path in (run / "checkpoints").iterdir()] == ["step-00000100"]


def test_a_location_can_have_any_name(tmp_path: Path, run: Path, copy: Copy) -> None:
    place = tmp_path / "my place é 100%"
    copy(run, place, 100)

    assert (place / run.name / "step-00000100" / META_NAME).is_file()


def test_the_last_finite_copy_is_kept(run: Path, place: Path, save: Save, world: World) -> None:
    section = CheckpointSection(copy_to=str(place), keep_last=2)
    copier = CheckpointCopier(run, section, world)
    for step, val_loss in ((100, 1.5), (200, math.nan), (300, math.nan), (400, math.nan)):
        copier.begin(save(run, step, val_loss))
        copier.finish(print)

    names = CopyTarget(str(place), run).complete()
    assert names == ["step-00000100", "step-00000300", "step-00000400"]
