"""A run's folder is found after a move, and no other run is mistaken for it."""

import shutil
from pathlib import Path

import pytest

from data_pipeline.errors import StorageError
from megaback.faults.exit_record import record_start
from megaback.faults.run_place import RunPlace
from megaback.run_folder import HISTORY_NAME


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    record_start(folder, step=0)
    return folder


def replace_by_another(run: Path) -> None:
    run.mkdir()
    record_start(run, step=0)


def test_a_folder_that_was_not_moved_keeps_its_path(run: Path) -> None:
    assert RunPlace(run).now() == run


def test_a_folder_that_was_moved_is_found_even_if_another_run_replaces_it(
    run: Path, tmp_path: Path
) -> None:
    place, moved = RunPlace(run), tmp_path / "moved"
    run.rename(moved)
    assert place.now() == moved
    replace_by_another(run)
    assert place.now() == moved


def test_a_folder_that_was_deleted_keeps_its_path(run: Path) -> None:
    place = RunPlace(run)
    shutil.rmtree(run)

    assert place.now() == run


def test_another_run_in_place_of_a_deleted_one_is_refused(run: Path) -> None:
    place = RunPlace(run)
    shutil.rmtree(run)
    replace_by_another(run)

    with pytest.raises(StorageError, match="replaced by another run"):
        place.now()


def test_a_folder_whose_history_was_edited_is_still_the_run_s(run: Path) -> None:
    place = RunPlace(run)
    (run / HISTORY_NAME).write_text('{"event": "start", "step": 7, "time": 1}\n')

    assert place.now() == run


def test_a_copy_in_place_of_a_deleted_folder_is_the_run_s(run: Path, tmp_path: Path) -> None:
    place = RunPlace(run)
    shutil.copytree(run, tmp_path / "copy")
    shutil.rmtree(run)
    (tmp_path / "copy").rename(run)

    assert place.now() == run
